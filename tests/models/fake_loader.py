"""Models that a host can swap: fakes of several fingerprints over one real store."""

from __future__ import annotations

import dataclasses
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from tests.api.conftest import TEMPLATE, byte_tokenizer
from tests.engine.harness import WAIT_S

from dormouse.domain.errors import ModelNotFound, UnsupportedModel
from dormouse.engine.engine import Engine
from dormouse.engine.options import EngineOptions
from dormouse.models.chat import ChatModel
from dormouse.models.chat_template import ChatTemplate
from dormouse.models.folder import ModelFolder
from dormouse.models.loader import Candidate
from dormouse.models.progress import Progress, no_progress
from dormouse.models.served import ServedModel
from dormouse.runtimes.fake import EOS, FakeRuntime
from dormouse.store.block_store import BlockStore

NEEDED_NBYTES = 100


class NamedRuntime(FakeRuntime):
    """A fake of its own fingerprint."""

    def __init__(self, name: str, num_pages: int) -> None:
        super().__init__(num_pages)
        self._spec = dataclasses.replace(self._spec, name=name, fingerprint=f"fake-{name}")
        self.is_closed = False

    def close(self) -> None:
        self.is_closed = True


class FakeLoader:
    """Has the models `a`, `b` and `c`, and `odd`, which is not supported. `failing` names do not load;
    `free` is how much memory there is; loading waits for `gate`."""

    def __init__(
        self,
        store: BlockStore,
        *,
        free: int = 10 * NEEDED_NBYTES,
        make: Callable[[str], FakeRuntime] = lambda name: NamedRuntime(name, 64),
        options: EngineOptions | None = None,
        deadline_s: float = 30.0,
    ) -> None:
        self.free = free
        self.failing: set[str] = set()
        self.num_loads: Counter[str] = Counter()
        self.unloaded: list[ServedModel] = []
        self.gate = threading.Event()
        self.gate.set()
        self.loading = threading.Semaphore(0)
        self._store = store
        self._make = make
        self._options = options or EngineOptions()
        self._deadline_s = deadline_s
        self._chat = ChatModel(byte_tokenizer(), ChatTemplate({"default": TEMPLATE}, {}), frozenset({EOS}))

    def knows(self, name: str) -> bool:
        return name in ("a", "b", "c", "odd")

    def models(self) -> list[ModelFolder]:
        return [ModelFolder(Path("/models") / name, name, {}, ()) for name in ("a", "b", "c", "odd")]

    def find(self, reference: str, on_progress: Progress = no_progress) -> Candidate:
        on_progress(f"looking for {reference}", 1, 1)
        if not self.knows(reference):
            raise ModelNotFound(f"no model {reference!r}")
        if reference == "odd":
            raise UnsupportedModel("odd has no layers")
        folder = next(folder for folder in self.models() if folder.name == reference)
        return Candidate(folder, self._chat, NEEDED_NBYTES)

    def free_nbytes(self) -> int:
        return self.free

    def held_nbytes(self, served: ServedModel) -> int:
        assert served.engine.runtime.num_pages
        return NEEDED_NBYTES

    def load(self, candidate: Candidate) -> ServedModel:
        name = candidate.folder.name
        self.loading.release()
        assert self.gate.wait(WAIT_S)
        self.num_loads[name] += 1
        if name in self.failing:
            raise MemoryError(f"no room for {name}")
        runtime = self._make(name)
        chat = candidate.chat
        engine = Engine(runtime, self._store, chat.decode_stream, chat.eos_token_ids, self._options)
        return ServedModel(name, 1_700_000_000, chat, engine, self._deadline_s, candidate.folder)

    def unload(self, served: ServedModel) -> None:
        assert self._store.flush(timeout_s=4 * WAIT_S)
        served.engine.check()
        served.engine.runtime.close()
        self.unloaded.append(served)
