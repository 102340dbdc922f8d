"""The torch runtime: a decoder, an arena and the kernels between them, on one device."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dormouse.domain.cache_spec import CacheSpec, KVFormat
from dormouse.domain.errors import ModelError
from dormouse.domain.model_spec import ModelSpec
from dormouse.domain.plan import WARM_UP, Plan
from dormouse.runtimes.base import Logits
from dormouse.runtimes.context import AS_TRAINED, Context
from dormouse.runtimes.decoder_config import DecoderConfig
from dormouse.runtimes.fingerprint import DigestCache, model_fingerprint
from dormouse.runtimes.model_files import weight_files
from dormouse.runtimes.torch.arena import Arena
from dormouse.runtimes.torch.decoder import Decoder, Pass
from dormouse.runtimes.torch.kernels import RowOps
from dormouse.runtimes.torch.layers import LayerOps
from dormouse.runtimes.torch.mapped import drop_mapped
from dormouse.runtimes.torch.preflight import read_decoder_config
from dormouse.runtimes.torch.selection import bind_layers, linear_maker, load_kernels, load_row_ops
from dormouse.runtimes.torch.step import Step
from dormouse.runtimes.torch.weights import Checkpoint, DecoderLoader

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True, slots=True)
class _Parts:
    """What `close` lets go of."""

    decoder: Decoder
    arena: Arena
    layers: tuple[LayerOps, ...]
    row_ops: RowOps


class TorchRuntime:
    """See `Runtime`. Row invariant on CPUs; other devices choose kernels by shape and promise it not."""

    def __init__(self, spec: ModelSpec, cache: CacheSpec, parts: _Parts, weights_nbytes: int):
        """Use `load`."""
        self._spec = spec
        self._cache = cache
        self._open: _Parts | None = parts
        self._num_pages = parts.arena.num_pages
        self._weights_nbytes = weights_nbytes
        self._row_invariant = parts.arena.memory.device.type == "cpu"

    @classmethod
    def load(
        cls,
        folder: Path,
        *,
        name: str,
        kv_format: KVFormat,
        block_size: int,
        arena_tokens: int,
        device: str = "cpu",
        dtype: str | None = None,
        weights: str = "bf16",
        context: Context = AS_TRAINED,
        threads: int | None = None,
        digests: DigestCache | None = None,
    ) -> TorchRuntime:
        """Load a model folder: config.json and safetensors.

        `dtype` is `bf16` or `fp32`; None takes what the device computes fast. `weights` is one of
        `selection.WEIGHTS`. `threads` sets torch's number
        of threads for the whole process. `arena_tokens` is rounded up to whole pages. Raises
        UnsupportedModel, ModelFilesMissing, or ModelError when the device is absent or too small, or when
        the model cannot have that context.
        """
        if threads is not None:
            torch.set_num_threads(threads)
        target = _device(device)
        compute = _dtype(dtype, target)
        config, length = context.fit(read_decoder_config(folder))
        files = weight_files(folder)
        fingerprint = model_fingerprint(folder, files, config.canonical(), digests)
        spec = _model_spec(name, config, fingerprint, length)
        cache = spec.cache_spec(kv_format, block_size)
        num_pages = -(-arena_tokens // block_size)
        loader = DecoderLoader(config, Checkpoint(files), target, compute, linear_maker(weights, target))
        with ExitStack() as opened:
            # First, so that its headroom is mapped beside the loading of weights. Outside of inference mode:
            # its tensors could not be written to by `copy_page` later.
            arena = Arena(cache, num_pages, target)
            opened.callback(arena.close)
            with torch.inference_mode():
                decoder = loader.load(min(length, num_pages * block_size))
            widths = (config.hidden_size, config.intermediate_size, config.head_dim)
            ops = load_row_ops(widths, target)
            layers = bind_layers(decoder, cache, load_kernels(cache, target), ops)
            runtime = cls(spec, cache, _Parts(decoder, arena, layers, ops), loader.nbytes)
            # Kernels are chosen and scratch memory is made on first use: not on the first request's time.
            runtime.forward(WARM_UP)
            opened.pop_all()
        drop_mapped(files)
        return runtime

    @property
    def name(self) -> str:
        """`torch`."""
        return "torch"

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
    def row_invariant(self) -> bool:
        """On CPUs; other devices choose kernels by shape."""
        return self._row_invariant

    @property
    def weights_nbytes(self) -> int:
        """Bytes of weights held in memory; the mapped embedding file is not counted."""
        return self._weights_nbytes

    @property
    def working_nbytes(self) -> int:
        """Pages are computed on as they are."""
        return 0

    @property
    def arena_nbytes(self) -> int:
        """Bytes reserved for pages; the system maps them on first use."""
        return self._num_pages * self._cache.block_nbytes

    def forward(self, plan: Plan) -> Logits:
        """See `Runtime.forward`."""
        parts = self._parts()
        if not plan.chunks:
            return np.empty((0, self._spec.vocab_size), dtype=np.float32)
        plan.check(self._spec, self._num_pages, self._cache.block_size)
        parts.arena.reach(max(max(chunk.pages) for chunk in plan.chunks))
        arena = parts.arena.memory
        with torch.inference_mode():
            step = Step.from_plan(plan, self._cache.block_size, arena.device)
            logits = Pass(parts.decoder, parts.layers, step, arena, parts.row_ops).run()
        result: Logits = logits.cpu().numpy()
        return result

    def page_buffer(self, page: int) -> memoryview:
        """See `Runtime.page_buffer`; on the CPU it is the page itself."""
        return self._parts().arena.page_buffer(page)

    def page_loaded(self, page: int) -> None:
        """See `Runtime.page_loaded`."""
        self._parts().arena.page_loaded(page)

    def read_page(self, page: int, num_tokens: int) -> bytes:
        """See `Runtime.read_page`."""
        return self._parts().arena.read_page(page, num_tokens)

    def copy_page(self, source: int, target: int, num_tokens: int) -> None:
        """See `Runtime.copy_page`."""
        self._parts().arena.copy_page(source, target, num_tokens)

    def close(self) -> None:
        """Let go of weights and arena; memory is freed once no page buffer is held either. Idempotent."""
        if self._open is not None:
            self._open.arena.close()
        self._open = None

    def _parts(self) -> _Parts:
        if self._open is None:
            raise RuntimeError("the runtime is closed")
        return self._open


def _model_spec(name: str, config: DecoderConfig, fingerprint: str, length: int) -> ModelSpec:
    return ModelSpec(
        name=name,
        architecture=config.architecture,
        fingerprint=fingerprint,
        num_layers=len(config.layers),
        num_kv_heads=config.num_kv_heads,
        k_head_dim=config.head_dim,
        v_head_dim=config.head_dim,
        vocab_size=config.vocab_size,
        context_length=length,
    )


def _device(name: str) -> torch.device:
    """The device, if this machine and this build of torch have it. Raises ModelError otherwise."""
    available = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    kind = name.partition(":")[0]
    if kind not in available:
        raise ModelError(f"device {name!r} is not known; use {', '.join(available)}")
    if not available[kind]:
        raise ModelError(f"device {name!r} is not available to torch here; use --device cpu")
    return torch.device(name)


def _dtype(name: str | None, device: torch.device) -> torch.dtype:
    """bf16 unless the CPU would have to emulate it. Raises ModelError for an unknown name."""
    if name is None:
        features = torch.cpu.get_capabilities() if device.type == "cpu" else {"amx_bf16": True}
        name = "bf16" if features.get("amx_bf16") or features.get("avx512_bf16") else "fp32"
    if name not in DTYPES:
        raise ModelError(f"dtype {name!r} is not known; use {' or '.join(DTYPES)}")
    return DTYPES[name]
