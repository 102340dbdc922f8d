"""What is used of mlx-lm, imported in one place: importing it changes the process, and that is undone."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def _kept_file_limit() -> Iterator[None]:
    """mlx-lm bounds the process to 4096 open files as it is imported, for good; a server needs its own."""
    original = resource.setrlimit
    resource.setrlimit = lambda *_: None
    try:
        yield
    finally:
        resource.setrlimit = original


with _kept_file_limit():
    from mlx_lm.models import base as base
    from mlx_lm.models.cache import KVCache as KVCache
    from mlx_lm.models.cache import RotatingKVCache as RotatingKVCache
    from mlx_lm.models.cache import make_prompt_cache as make_prompt_cache
    from mlx_lm.utils import load_model as load_model
