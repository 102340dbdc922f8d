"""Everything that serves models, opened in order and closed in the reverse one."""

from __future__ import annotations

import logging
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass

import psutil

from dormouse.engine.engine import Engine
from dormouse.engine.options import EngineOptions
from dormouse.models.aliases import Aliases
from dormouse.models.chat import ChatModel
from dormouse.models.folder import ModelFolder
from dormouse.models.host import HostOptions, ModelHost
from dormouse.models.loader import Candidate
from dormouse.models.progress import Progress, no_progress
from dormouse.models.runtimes import choose, load_runtime
from dormouse.models.served import ServedModel
from dormouse.models.settling import resettle, settle, unsettle
from dormouse.models.sources import has_model, list_models, resolve
from dormouse.models.storage import open_store
from dormouse.runtimes.base import Runtime
from dormouse.settings import Settings
from dormouse.store.block_store import BlockStore

log = logging.getLogger(__name__)

_FLUSH_TIMEOUT_S = 60.0
_NEEDED_SHARE = 1.1
"""Of the sizes that are known: rope tables, scratch memory and what loading needs on the way come on top."""


@dataclass(frozen=True)
class Stack:
    """An open store and a host, which owns the loaded model and its engine."""

    store: BlockStore
    host: ModelHost

    @classmethod
    def prepare(cls, settings: Settings) -> Stack:
        """Open the store; no model is loaded yet, `host.start` does it. Raises StoreError."""
        store = open_store(settings)
        return cls(store, ModelHost(None, FolderLoader(settings, store), _host_options(settings)))

    @classmethod
    def open(cls, settings: Settings, on_progress: Progress = no_progress) -> Stack:
        """Open all of it; what was opened before a failure is closed again.

        Raises StoreError, ModelError or ModelNotFound.
        """
        with ExitStack() as opened:
            store = open_store(settings)
            opened.callback(store.close)
            loader = FolderLoader(settings, store)
            served = loader.load(loader.find(settings.model, on_progress))
            opened.pop_all()  # all of it is open: from here on `close` is the owner's
        return cls(store, ModelHost(served, loader, _host_options(settings)))

    @property
    def served(self) -> ServedModel:
        """The model that is served."""
        return self.host.served

    @property
    def runtime(self) -> Runtime:
        """What computes it."""
        return self.served.engine.runtime

    def close(self, grace_s: float = 0.0) -> None:
        """Let running requests end within `grace_s` seconds, flush, and close everything."""
        self.host.stop(grace_s)
        self.host.close()
        self.store.close()
        unsettle()

    def __enter__(self) -> Stack:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class FolderLoader:
    """Loads model folders into the runtime of the settings. See `Loader`."""

    def __init__(self, settings: Settings, store: BlockStore) -> None:
        self._settings = settings
        self._store = store
        self._elsewhere: dict[str, ModelFolder] = {}
        """Models that were loaded from outside of the models folder, by name."""

    def knows(self, name: str) -> bool:
        """See `Loader.knows`."""
        return name in self._elsewhere or has_model(name, self._settings.models_dir)

    def models(self) -> list[ModelFolder]:
        """See `Loader.models`."""
        found = {folder.name: folder for folder in list_models(self._settings.models_dir)}
        return sorted((found | self._elsewhere).values(), key=lambda folder: folder.name)

    def find(self, reference: str, on_progress: Progress = no_progress) -> Candidate:
        """See `Loader.find`. The estimate is the size of the weights, of the arena where it is set, and
        a tenth of both."""
        known = self._elsewhere.get(reference)
        # First of all: what cannot be computed here is not fetched.
        backend = choose(self._settings)
        folder = known or resolve(reference, self._settings.models_dir, on_progress=on_progress)
        with ThreadPoolExecutor(1) as reading:
            chat = reading.submit(ChatModel.load, folder)
            # A runtime takes seconds to import: meanwhile the tokenizer is read.
            checked = backend.check(folder)
        block_size = checked.cache.block_size
        arena_nbytes = (self._settings.arena_tokens or 2 * block_size) * checked.token_nbytes
        needed = int((checked.weights_nbytes + arena_nbytes) * _NEEDED_SHARE)
        return Candidate(folder, chat.result(), needed)

    def free_nbytes(self) -> int:
        """See `Loader.free_nbytes`."""
        return int(psutil.virtual_memory().available)

    def held_nbytes(self, served: ServedModel) -> int:
        """See `Loader.held_nbytes`: weights, pages that were used, and what they are computed on in."""
        stats, runtime = served.engine.stats(), served.engine.runtime
        pages_nbytes = (stats.pages_used + stats.pages_idle) * runtime.cache.block_nbytes
        return runtime.weights_nbytes + pages_nbytes + runtime.working_nbytes

    def load(self, candidate: Candidate) -> ServedModel:
        """See `Loader.load`."""
        settings, folder, chat = self._settings, candidate.folder, candidate.chat
        # In a thread that ends: OpenMP keeps the workers of each thread that ever computed, and
        # with more of them than cores it puts every barrier to sleep (decode was 1.5 times slower).
        with ThreadPoolExecutor(1) as loading:
            runtime = loading.submit(load_runtime, settings, folder).result()
        with ExitStack() as opened:
            opened.callback(runtime.close)
            options = EngineOptions(
                token_budget=settings.step_tokens,
                max_running=settings.max_running,
                max_queue=settings.max_queue,
                speculate=settings.speculation == "auto",
                sync=settings.durability == "sync",
            )
            engine = Engine(runtime, self._store, chat.decode_stream, chat.eos_token_ids, options)
            opened.pop_all()
        settle()
        if not self._is_in_models_dir(folder):
            self._elsewhere[folder.name] = folder
        return ServedModel(folder.name, int(time.time()), chat, engine, settings.request_timeout_s, folder)

    def unload(self, served: ServedModel) -> None:
        """See `Loader.unload`."""
        if not self._store.flush(_FLUSH_TIMEOUT_S):
            log.error("not everything reached the disk: %s", self._store.health())
        served.engine.runtime.close()
        resettle()

    def _is_in_models_dir(self, folder: ModelFolder) -> bool:
        return folder.path == (self._settings.models_dir / folder.name).absolute()


def _host_options(settings: Settings) -> HostOptions:
    return HostOptions(
        aliases=Aliases.parse(settings.aliases),
        auto_swap=settings.auto_swap == "on",
        stay_s=settings.swap_stay_s,
        wait_s=settings.swap_wait_s,
        max_waiting=settings.max_queue,
    )
