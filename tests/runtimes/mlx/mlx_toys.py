"""Toys of every family under mlx, and mlx-lm's own caches to hold them against."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np

from dormouse.domain.cache_spec import KVFormat
from dormouse.domain.plan import Chunk, Plan
from dormouse.runtimes.base import Logits, Runtime
from dormouse.runtimes.context import AS_TRAINED
from dormouse.runtimes.mlx import lm
from dormouse.runtimes.mlx.config import Meaning
from dormouse.runtimes.mlx.model import Loaded, load_model
from dormouse.runtimes.mlx.runtime import MlxRuntime
from dormouse.runtimes.model_files import read_config, weight_files

BLOCK = 16


def load_mlx(
    folder: Path, kv_format: KVFormat = KVFormat.F32, dtype: str | None = "fp32", num_pages: int = 24
) -> MlxRuntime:
    """A runtime with blocks of 16."""
    return MlxRuntime.load(
        folder,
        name="toy",
        kv_format=kv_format,
        block_size=BLOCK,
        arena_tokens=num_pages * BLOCK,
        dtype=dtype,
    )


def load_alone(folder: Path, dtype: str = "fp32") -> Loaded:
    """The model as the runtime loads it, without a runtime."""
    raw = read_config(folder)
    meaning = Meaning.of(raw, AS_TRAINED)
    return load_model(folder, weight_files(folder), raw, meaning.config, dtype)


def own_logits(loaded: Loaded, tokens: Sequence[int], sizes: Sequence[int]) -> Logits:
    """By mlx-lm's own caches: after each chunk of `sizes` (the last one repeated), `[chunks, vocab_size]`."""
    caches = lm.make_prompt_cache(loaded.module)
    rows, start, turn = [], 0, 0
    while start < len(tokens):
        end = min(start + sizes[min(turn, len(sizes) - 1)], len(tokens))
        logits = loaded.module(mx.array([tokens[start:end]]), cache=caches)
        rows.append(np.array(logits[0, -1].astype(mx.float32)))
        start, turn = end, turn + 1
    return np.stack(rows)


def our_logits(runtime: Runtime, tokens: Sequence[int], sizes: Sequence[int], pages: Sequence[int]) -> Logits:
    """The same by a runtime, in `pages`."""
    rows, start, turn = [], 0, 0
    while start < len(tokens):
        end = min(start + sizes[min(turn, len(sizes) - 1)], len(tokens))
        rows.append(runtime.forward(Plan((chunk(tokens, start, end, pages),)))[0])
        start, turn = end, turn + 1
    return np.stack(rows)


def chunk(tokens: Sequence[int], start: int, end: int, pages: Sequence[int], num_logits: int = 1) -> Chunk:
    """`tokens[start:end]` of a sequence that lives in `pages`."""
    return Chunk(tuple(tokens[start:end]), start, tuple(pages[: -(-end // BLOCK)]), num_logits)


def close_to(got: Logits, expected: Logits, tolerance: float = 1e-4) -> None:
    """Equal but for `tolerance` of the largest logit."""
    allowed = tolerance * float(np.abs(expected).max())
    np.testing.assert_allclose(got, expected, rtol=0, atol=allowed)
