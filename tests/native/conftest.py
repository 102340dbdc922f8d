"""Every native test leaves the instruction set and the number of threads as it found them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    from tests.native.oracle import _native

    isa, threads = _native.isa(), torch.get_num_threads()
    yield
    _native.set_isa(isa)
    torch.set_num_threads(threads)
