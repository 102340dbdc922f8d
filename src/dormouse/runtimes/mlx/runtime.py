"""The MLX runtime: mlx-lm's model over views of the pages. Its thread is the one that calls it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from dormouse.domain.cache_spec import CacheSpec, KVFormat
from dormouse.domain.model_spec import ModelSpec
from dormouse.domain.plan import WARM_UP, Chunk, Plan
from dormouse.runtimes.base import Logits
from dormouse.runtimes.context import AS_TRAINED, Context
from dormouse.runtimes.fingerprint import DigestCache, model_fingerprint
from dormouse.runtimes.mlx.blas import on_one_thread, set_threads
from dormouse.runtimes.mlx.calling import Caller
from dormouse.runtimes.mlx.codec import Codec
from dormouse.runtimes.mlx.config import Meaning
from dormouse.runtimes.mlx.memory import bound_memory
from dormouse.runtimes.mlx.model import load_model
from dormouse.runtimes.mlx.pages import Pages
from dormouse.runtimes.mlx.probe import find_way, measure
from dormouse.runtimes.mlx.products import check_products
from dormouse.runtimes.mlx.routing import route_attention
from dormouse.runtimes.mlx.stream import computing
from dormouse.runtimes.mlx.views import Views
from dormouse.runtimes.model_files import read_config, weight_files


@dataclass(frozen=True, slots=True)
class _Parts:
    """What `close` lets go of."""

    caller: Caller
    pages: Pages
    views: Views


class MlxRuntime:
    """See `Runtime`. Row invariant within rounding only: products of other shapes add up in another order."""

    def __init__(self, spec: ModelSpec, cache: CacheSpec, parts: _Parts, weights_nbytes: int) -> None:
        """Use `load`."""
        self._spec = spec
        self._cache = cache
        self._open: _Parts | None = parts
        self._num_pages = parts.pages.num_pages
        self._weights_nbytes = weights_nbytes
        self._working_nbytes = 0

    @classmethod
    def load(
        cls,
        folder: Path,
        *,
        name: str,
        kv_format: KVFormat,
        block_size: int,
        arena_tokens: int,
        dtype: str | None = None,
        threads: int | None = None,
        digests: DigestCache | None = None,
        context: Context = AS_TRAINED,
    ) -> MlxRuntime:
        """Load a model folder: config.json and safetensors, as mlx-lm reads them.

        `dtype` is `bf16` or `fp32`; None takes what the device computes fast. `threads` sets the number of
        threads that products of matrices use on a CPU. `arena_tokens` is rounded up to whole pages. Raises
        UnsupportedModel, ModelFilesMissing, or ModelError when mlx is too old, the memory too small, or the
        model cannot have that context.
        """
        if threads is not None:
            set_threads(threads)
        raw = read_config(folder)
        files = weight_files(folder)
        meaning = Meaning.of(raw, context)
        fingerprint = model_fingerprint(folder, files, meaning.canonical, digests)
        bound_memory()
        with computing():
            check_products()  # where products will be computed, and on as many threads
        with on_one_thread():
            loaded = load_model(folder, files, raw, meaning.config, dtype)
            route_attention(loaded.module)
            shape = measure(loaded)
            way = find_way(loaded, shape)
        spec = ModelSpec(
            name=name,
            architecture=meaning.architecture,
            fingerprint=fingerprint,
            num_layers=len(loaded.windows),
            num_kv_heads=shape.num_kv_heads,
            k_head_dim=shape.k_head_dim,
            v_head_dim=shape.v_head_dim,
            vocab_size=shape.vocab_size,
            context_length=meaning.context_length,
        )
        cache = spec.cache_spec(kv_format, block_size)
        pages = Pages(cache, -(-arena_tokens // block_size))
        codec = Codec(cache, loaded.dtype, packed=way.routed and _attends_packed())
        caller = Caller(loaded, way, cache, codec, shape.vocab_size)
        views = Views(pages, codec, pages.nbytes)
        runtime = cls(spec, cache, _Parts(caller, pages, views), loaded.nbytes)
        # What is computed on first use is computed now: not on the first request's time, nor on its thread.
        runtime.forward(WARM_UP)
        return runtime

    @property
    def name(self) -> str:
        """`mlx`."""
        return "mlx"

    @property
    def row_invariant(self) -> bool:
        """See `Runtime.row_invariant`."""
        return False

    @property
    def spec(self) -> ModelSpec:
        """The loaded model."""
        return self._spec

    @property
    def cache(self) -> CacheSpec:
        """The format of every page."""
        return self._cache

    @property
    def num_pages(self) -> int:
        """Pages are numbered from 0."""
        return self._num_pages

    @property
    def weights_nbytes(self) -> int:
        """Bytes of weights held in memory."""
        return self._weights_nbytes

    @property
    def working_nbytes(self) -> int:
        """Views: K and V as MLX computes on them, and the free lanes between them.

        Those of running sequences are always held; others up to the size of the arena.
        """
        return self._working_nbytes

    def forward(self, plan: Plan) -> Logits:
        """See `Runtime.forward`."""
        parts, chunks = self._parts(), plan.chunks
        plan.check(self._spec, self._num_pages, self._cache.block_size)
        logits: dict[int, Logits] = {}
        with computing():
            for indices in parts.caller.calls(chunks):
                logits.update(zip(indices, self._call([chunks[index] for index in indices]), strict=True))
        self._working_nbytes = parts.views.trim(len(chunks))
        empty = np.empty((0, self._spec.vocab_size), np.float32)
        return np.concatenate([empty, *(logits[index] for index in range(len(chunks)))])

    def page_buffer(self, page: int) -> memoryview:
        """See `Runtime.page_buffer`; it is the page itself."""
        return self._parts().pages.buffer(page)

    def page_loaded(self, page: int) -> None:
        """See `Runtime.page_loaded`."""
        self._parts().pages.touched(page)

    def read_page(self, page: int, num_tokens: int) -> bytes:
        """See `Runtime.read_page`."""
        return self._parts().pages.read(page, num_tokens)

    def copy_page(self, source: int, target: int, num_tokens: int) -> None:
        """See `Runtime.copy_page`."""
        parts = self._parts()
        parts.pages.copy(source, target, num_tokens)
        parts.views.copied(source, target, num_tokens)

    def close(self) -> None:
        """Let go of weights, views and pages; memory is freed once no page buffer is held. Idempotent."""
        if self._open is not None:
            self._open.views.clear()
        self._open = None
        mx.clear_cache()

    def _call(self, chunks: list[Chunk]) -> list[Logits]:
        """Compute chunks together; each one's logits."""
        parts = self._parts()
        views = [parts.views.take(chunk) for chunk in chunks]
        outcome = parts.caller.run(chunks, views)
        for chunk, view, halves in zip(chunks, views, outcome.stored, strict=True):
            parts.pages.write_rows(chunk.pages, chunk.start, halves)
            parts.views.keep(view, chunk)
        ends = np.cumsum([chunk.num_logits for chunk in chunks])
        return np.split(outcome.logits, ends[:-1])

    def _parts(self) -> _Parts:
        if self._open is None:
            raise RuntimeError("the runtime is closed")
        return self._open


def _attends_packed() -> bool:
    """Whether attention computes on quantized arrays. See docs/mlx.md for what was measured where."""
    return mx.default_device().type != mx.DeviceType.cpu
