"""The end of start-up: what was made to stay is told apart from what was needed on the way."""

from __future__ import annotations

import ctypes
import gc
import sys


def settle() -> None:
    """Give back memory that loading has used, and let the collector leave alone what is there.

    Modules and weights stay as long as the process. Walking them takes the collector 100 ms, in which no
    stream goes on.
    """
    gc.freeze()
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):  # glibc has it, musl does not
            libc.malloc_trim(0)


def unsettle() -> None:
    """What `settle` kept from the collector is its business again."""
    gc.unfreeze()


def resettle() -> None:
    """After a model was let go of: collect what only `settle` kept, and settle what is left.

    The collector walks everything once, which takes it 100 ms or so.
    """
    unsettle()
    gc.collect()
    settle()
