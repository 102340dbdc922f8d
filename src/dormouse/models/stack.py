"""Everything that serves one model, opened in order and closed in the reverse one."""

from __future__ import annotations

import logging
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass

import psutil

from dormouse.domain.cache_spec import CacheSpec
from dormouse.engine.engine import Engine
from dormouse.engine.loop import EngineOptions
from dormouse.models.chat import ChatModel
from dormouse.models.folder import ModelFolder
from dormouse.models.progress import Progress, no_progress
from dormouse.models.served import ServedModel
from dormouse.models.settling import settle, unsettle
from dormouse.models.sources import resolve
from dormouse.runtimes.base import Runtime
from dormouse.settings import Settings
from dormouse.store.block_store import BlockStore

log = logging.getLogger(__name__)

_FLUSH_TIMEOUT_S = 60.0
_DEFAULT_CONTEXTS = 32
_DEFAULT_MEMORY_SHARE = 0.25
_DIGESTS = "digests.json"


@dataclass(frozen=True)
class Stack:
    """An open store, a loaded model and a running engine."""

    store: BlockStore
    runtime: Runtime
    served: ServedModel

    @classmethod
    def open(cls, settings: Settings, on_progress: Progress = no_progress) -> Stack:
        """Open all of it; what was opened before a failure is closed again.

        Raises StoreError, ModelError or ModelNotFound.
        """
        folder = resolve(settings.model, settings.models_dir, on_progress=on_progress)
        with ExitStack() as opened:
            store = BlockStore.open(settings.data_dir, quota_nbytes=settings.disk_quota_nbytes)
            opened.callback(store.close)
            # In a thread that ends: OpenMP keeps the workers of each thread that ever computed, and
            # with more of them than cores it puts every barrier to sleep (decode was 1.5 times slower).
            with ThreadPoolExecutor(1) as loader:
                loading = loader.submit(load_runtime, settings, folder)
                chat = ChatModel.load(folder)
                runtime = loading.result()
            opened.callback(runtime.close)
            options = EngineOptions(
                token_budget=settings.step_tokens,
                max_running=settings.max_running,
                max_queue=settings.max_queue,
                speculate=settings.speculation == "auto",
                sync=settings.durability == "sync",
            )
            engine = Engine(runtime, store, chat.decode_stream, chat.eos_token_ids, options)
            opened.pop_all()  # all of it is open: from here on `close` is the owner's
        settle()
        served = ServedModel(folder.name, int(time.time()), chat, engine, settings.request_timeout_s)
        return cls(store, runtime, served)

    def close(self, grace_s: float = 0.0) -> None:
        """Let running requests end within `grace_s` seconds, flush, and close everything."""
        self.served.engine.stop(grace_s)
        if not self.store.flush(_FLUSH_TIMEOUT_S):
            log.error("not everything reached the disk: %s", self.store.health())
        self.store.close()
        self.runtime.close()
        unsettle()

    def __enter__(self) -> Stack:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def load_runtime(settings: Settings, folder: ModelFolder) -> Runtime:
    """The model in a runtime, with an arena of `settings.arena_tokens` or a default that fits."""
    # torch takes seconds to import: only what computes pays for it.
    from dormouse.runtimes.torch.config import DecoderConfig
    from dormouse.runtimes.torch.context import Context
    from dormouse.runtimes.torch.fingerprint import DigestCache
    from dormouse.runtimes.torch.runtime import TorchRuntime

    config = DecoderConfig.from_hf(folder.config)
    context = Context(settings.context_length, settings.rope_scaling, settings.rope_factor)
    _, context_length = context.fit(config)
    if context_length > config.context_length:
        log.warning(
            "context of %d tokens by %s rope scaling with factor %g: the model was trained for %d; words "
            "become worse the further beyond that a context goes, and a little worse below",
            context_length,
            settings.rope_scaling,
            settings.rope_factor or context_length / config.context_length,
            config.context_length,
        )
    arena_tokens = settings.arena_tokens
    if arena_tokens is None:
        cache = CacheSpec.for_heads(
            settings.kv_format,
            settings.block_size,
            num_layers=len(config.layers),
            num_kv_heads=config.num_kv_heads,
            k_head_dim=config.head_dim,
            v_head_dim=config.head_dim,
        )
        arena_tokens = default_arena(cache, context_length, folder.weights_nbytes)
    return TorchRuntime.load(
        folder.path,
        name=folder.name,
        kv_format=settings.kv_format,
        block_size=settings.block_size,
        arena_tokens=arena_tokens,
        device=settings.device,
        dtype=None if settings.dtype == "auto" else settings.dtype,
        weights=settings.weights,
        context=context,
        threads=settings.threads,
        digests=DigestCache(settings.models_dir / _DIGESTS),
    )


def default_arena(cache: CacheSpec, context_length: int, weights_nbytes: int) -> int:
    """Tokens that a share of the free memory holds: a full context at least, if it fits at all, and no more
    than many agents could use."""
    affordable = int((psutil.virtual_memory().available - weights_nbytes) / cache.token_nbytes)
    # A page is kept back, see `EngineLoop.max_length`.
    full = context_length + cache.block_size
    if affordable < full:
        log.warning(
            "the free memory holds %d tokens of KV, less than a context of %d; prompts are bounded by it",
            max(0, affordable),
            context_length,
        )
    share = max(int(affordable * _DEFAULT_MEMORY_SHARE), min(affordable, full))
    return max(2 * cache.block_size, min(share, _DEFAULT_CONTEXTS * context_length))
