"""What a loaded model is, found out by running it beside mlx-lm's own caches on a few tokens."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from itertools import product

import mlx.core as mx
import numpy as np

from dormouse.domain.cache_spec import CacheSpec, KVFormat
from dormouse.domain.errors import UnsupportedModel
from dormouse.domain.plan import Chunk
from dormouse.runtimes.base import Logits
from dormouse.runtimes.mlx import lm
from dormouse.runtimes.mlx.calling import Caller, Way
from dormouse.runtimes.mlx.codec import Codec
from dormouse.runtimes.mlx.model import Loaded
from dormouse.runtimes.mlx.view import View

log = logging.getLogger(__name__)

WAYS = tuple(Way(*flags) for flags in product((True, False), repeat=3) if flags[0] or not flags[1])
"""From best to plainest. Without our attention positions cannot differ within a call."""

_TEXTS = ((1, 2, 3, 4, 5, 6), (7, 3, 5, 1))
"""The last token of each is computed in a step of its own."""

_TOLERANCE = {mx.float32: 2e-3, mx.bfloat16: 6e-2}
"""Of the largest logit. A model that was misunderstood differs by as much as its logits."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What a model's caches hold for each token and layer, and how many logits it gives."""

    num_kv_heads: int
    k_head_dim: int
    v_head_dim: int
    vocab_size: int


def measure(loaded: Loaded) -> Shape:
    """Describe a run of the model with caches of its own: shapes are known before anything is computed.

    Raises UnsupportedModel where layers are not alike.
    """
    caches = lm.make_prompt_cache(loaded.module)
    logits = loaded.module(mx.array([_TEXTS[0]]), cache=caches)
    if any(cache.keys is None for cache in caches):
        raise UnsupportedModel("the model has layers without K and V of their own")
    shapes = {(cache.keys.shape[1], cache.keys.shape[3], cache.values.shape[3]) for cache in caches}
    if len(shapes) > 1:
        raise UnsupportedModel(f"the model's layers have different heads: {sorted(shapes)}")
    heads, k_head_dim, v_head_dim = shapes.pop()
    return Shape(heads, k_head_dim, v_head_dim, logits.shape[-1])


def find_way(loaded: Loaded, shape: Shape) -> Way:
    """The best way to call the model that gives what it gives with its own caches.

    Raises UnsupportedModel when none does.
    """
    expected = _own_logits(loaded)
    reason = ""
    for way in WAYS:
        reason = _differs(loaded, way, shape, expected)
        if not reason:
            return way
        log.info("the model cannot be called by %s: %s", way, reason)
    raise UnsupportedModel(f"the model's attention cannot be given other caches than its own: {reason}")


def _differs(loaded: Loaded, way: Way, shape: Shape, expected: Logits) -> str:
    """Why the model is not to be called in that way, or nothing."""
    try:
        got, attended = _our_logits(loaded, way, shape)
    except Exception as exc:  # noqa: BLE001  (mlx-lm's models raise whatever comes of what they did not expect)
        return f"{type(exc).__name__}: {exc}"
    if way.routed and attended < len(loaded.windows):
        return "its attention goes another way"
    if got.shape != expected.shape:
        return f"logits of shape {got.shape}"
    allowed = _TOLERANCE[loaded.dtype] * float(np.abs(expected).max())
    difference = float(np.abs(got - expected).max())
    return "" if difference <= allowed else f"its logits differ by {difference:.3g}"


def _own_logits(loaded: Loaded) -> Logits:
    """After each text, `[texts, vocab_size]`."""
    rows = []
    for text in _TEXTS:
        caches = lm.make_prompt_cache(loaded.module)
        mx.eval(loaded.module(mx.array([text[:-1]]), cache=caches))
        logits = loaded.module(mx.array([text[-1:]]), cache=caches)[0, -1].astype(mx.float32)
        rows.append(np.array(logits))
    return np.stack(rows)


def _our_logits(loaded: Loaded, way: Way, shape: Shape) -> tuple[Logits, int]:
    """The same by our caches, exact to fp32, and how often attention came to them in the last call."""
    cache = CacheSpec.for_heads(
        KVFormat.F32,
        16,
        num_layers=len(loaded.windows),
        num_kv_heads=shape.num_kv_heads,
        k_head_dim=shape.k_head_dim,
        v_head_dim=shape.v_head_dim,
    )
    caller = Caller(loaded, way, cache, Codec(cache, loaded.dtype, packed=False), shape.vocab_size)
    heads = [Chunk(text[:-1], 0, (0,), 0) for text in _TEXTS]
    lasts = [Chunk(text[-1:], len(text) - 1, (0,), 1) for text in _TEXTS]
    views = [View() for _ in _TEXTS]
    rows: dict[int, Logits] = {}
    attended = 0
    for chunks in (heads, lasts):
        for indices in caller.calls(chunks):
            outcome = caller.run([chunks[index] for index in indices], [views[index] for index in indices])
            attended = outcome.attended
            rows.update(zip(indices, outcome.logits, strict=False))
    return np.stack([rows[index] for index in range(len(_TEXTS))]), attended
