"""A runtime that fails as told, and a server around it whose health, metrics and log are at hand."""

from __future__ import annotations

import logging
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.api.conftest import TEMPLATE, byte_tokenizer

from dormouse.api.app import create_app
from dormouse.api.edge import Edge
from dormouse.api.server import Server, bind
from dormouse.domain.blocks import BlockKey, chain_links
from dormouse.domain.cache_spec import CacheSpec
from dormouse.domain.model_spec import ModelSpec, cache_namespace
from dormouse.domain.plan import Chunk, Plan
from dormouse.engine.engine import Engine
from dormouse.engine.options import EngineOptions
from dormouse.models.chat import ChatModel
from dormouse.models.chat_template import ChatTemplate
from dormouse.models.host import ModelHost
from dormouse.models.served import ServedModel
from dormouse.runtimes.base import Logits, Runtime
from dormouse.runtimes.fake import EOS, FakeRuntime, decode, encode
from dormouse.store.block_store import BlockStore
from dormouse.store.file_ops import FileOps
from dormouse.store.options import StoreOptions

WAIT_S = 20.0
UNTIL_S = 60.0
BLOCK = 16


class FaultyRuntime:
    """Passes everything on to `inner`. Before each call its hook may raise or wait; `on_logits` may change
    what a step computed. Implements `Runtime`."""

    def __init__(self, inner: Runtime) -> None:
        self.inner = inner
        self.on_forward: Callable[[Plan], None] = _nothing
        self.on_logits: Callable[[Plan, Logits], None] = _nothing
        self.on_read_page: Callable[[int], None] = _nothing
        self.on_page_loaded: Callable[[int], None] = _nothing

    @property
    def name(self) -> str:
        return self.inner.name

    @property
    def row_invariant(self) -> bool:
        return self.inner.row_invariant

    @property
    def spec(self) -> ModelSpec:
        return self.inner.spec

    @property
    def cache(self) -> CacheSpec:
        return self.inner.cache

    @property
    def num_pages(self) -> int:
        return self.inner.num_pages

    @property
    def weights_nbytes(self) -> int:
        return self.inner.weights_nbytes

    @property
    def working_nbytes(self) -> int:
        return self.inner.working_nbytes

    def forward(self, plan: Plan) -> Logits:
        self.on_forward(plan)
        logits = self.inner.forward(plan)
        self.on_logits(plan, logits)
        return logits

    def page_buffer(self, page: int) -> memoryview:
        return self.inner.page_buffer(page)

    def page_loaded(self, page: int) -> None:
        self.on_page_loaded(page)
        self.inner.page_loaded(page)

    def read_page(self, page: int, num_tokens: int) -> bytes:
        self.on_read_page(page)
        return self.inner.read_page(page, num_tokens)

    def copy_page(self, source: int, target: int, num_tokens: int) -> None:
        self.inner.copy_page(source, target, num_tokens)

    def close(self) -> None:
        self.inner.close()


def _nothing(*_: object) -> None:
    pass


class Gate:
    """Holds whoever comes while it is shut; `reached` is released for each of them."""

    def __init__(self) -> None:
        self.reached = threading.Semaphore(0)
        self._open = threading.Event()

    def wait(self, *_: object) -> None:
        self.reached.release()
        # Longer than `Site.until` asks, which must not get its answer from a gate that gave way.
        assert self._open.wait(UNTIL_S + WAIT_S), "the test forgot to open the gate"

    def open(self) -> None:
        self._open.set()


@dataclass
class Site:
    """A server on a free port, what is behind it, and what it says of itself."""

    url: str
    http: httpx.Client
    runtime: FaultyRuntime
    engine: Engine
    store: BlockStore
    folder: Path
    log: pytest.LogCaptureFixture

    def chat(self, text: str = "hello", *, agent: str | None = None, **fields: Any) -> httpx.Response:
        """A chat completion with one user message; greedy, eight tokens, unless told otherwise."""
        messages = [{"role": "user", "content": text}]
        body = {"model": "fake", "messages": messages, "temperature": 0, "max_tokens": 8} | fields
        headers = {} if agent is None else {"x-agent-id": agent}
        return self.http.post("/v1/chat/completions", json=body, headers=headers)

    def status(self) -> str:
        """What `/health` says."""
        status: str = self.http.get("/health").json()["status"]
        return status

    def reasons(self) -> set[str]:
        """The codes that `/health` gives; `/metrics` must have the same, but for what changes meanwhile."""
        before = self._codes()
        shown = {labels["code"] for labels, _ in self._samples("dormouse_health_reasons")}
        after = self._codes()
        assert before & after <= shown <= before | after
        return after

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples with these labels."""
        return sum(value for found, value in self._samples(name) if labels.items() <= found.items())

    def logged(self, level: int, text: str) -> bool:
        """Whether a line of that level says `text`."""
        return any(r.levelno == level and text in r.getMessage() for r in self.log.records)

    def until_well(self) -> None:
        """Ask until `/health` has nothing to complain about."""
        self.until(lambda: self.http.get("/health").json()["reasons"] == [])
        assert (self.status(), self.reasons()) == ("ok", set())

    def until(self, condition: Callable[[], bool]) -> None:
        """Ask until it is so. Each question is a request, so that this is no busy wait."""
        deadline = time.monotonic() + UNTIL_S
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError("it did not become so")
            self.http.get("/health/live")

    def keys(self, prompt: str) -> list[BlockKey]:
        """Names of the full blocks of a chat with this one message."""
        spec, cache = self.runtime.spec, self.runtime.cache
        tokens = encode(f"user: {prompt}\nassistant: ")
        links = chain_links(cache_namespace(spec, cache, "default"), tokens, cache.block_size)
        return [link.key for link in links if len(link.tokens) == cache.block_size]

    def _codes(self) -> set[str]:
        return {reason["code"] for reason in self.http.get("/health").json()["reasons"]}

    def _samples(self, name: str) -> list[tuple[dict[str, str], float]]:
        families = text_string_to_metric_families(self.http.get("/metrics").text)
        return [(s.labels, s.value) for family in families for s in family.samples if s.name == name]


@contextmanager
def serving(
    folder: Path,
    log: pytest.LogCaptureFixture,
    *,
    num_pages: int = 64,
    options: EngineOptions | None = None,
    deadline_s: float = 30.0,
    file_ops: FileOps | None = None,
    store_options: StoreOptions | None = None,
    clock: Callable[[], float] = time.time,
    around: Edge | None = None,
    buffer_nbytes: int | None = None,
) -> Iterator[Site]:
    """A server over the data folder `data`, which is checked when it ends. `buffer_nbytes` is what the system
    buffers of what it sends."""
    log.set_level(logging.INFO)
    logging.getLogger("uvicorn.access").setLevel(logging.WARNING)
    runtime = FaultyRuntime(FakeRuntime(num_pages))
    chat = ChatModel(byte_tokenizer(), ChatTemplate({"default": TEMPLATE}, {}), frozenset({EOS}))
    store = BlockStore.open(
        folder / "data", quota_nbytes=1 << 30, options=store_options, file_ops=file_ops, clock=clock
    )
    engine = Engine(runtime, store, chat.decode_stream, frozenset({EOS}), options or EngineOptions())
    host = ModelHost(ServedModel("fake", 1_700_000_000, chat, engine, deadline_s))
    app = create_app(host, store, max_body_nbytes=1_000_000, around=around)
    listener = bind("127.0.0.1", 0)
    if buffer_nbytes is not None:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer_nbytes)
    ready: queue.SimpleQueue[str] = queue.SimpleQueue()
    server = Server(app, host, grace_s=0, on_ready=ready.put)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        url = ready.get(timeout=WAIT_S)
        with httpx.Client(base_url=url, timeout=WAIT_S) as http:
            yield Site(url, http, runtime, engine, store, folder / "data", log)
    finally:
        server.should_exit = True
        thread.join(WAIT_S)
        assert not thread.is_alive()
        listener.close()
        engine.check()
        store.flush()
        store.check()
        store.close()


def text_of(answer: httpx.Response) -> str:
    """What a chat completion says; it must be one."""
    assert answer.status_code == 200, answer.text
    text: str = answer.json()["choices"][0]["message"]["content"]
    return text


def code_of(answer: httpx.Response) -> str | None:
    """The `code` of an error."""
    code: str | None = answer.json()["error"]["code"]
    return code


def is_of(chunk: Chunk, text: str) -> bool:
    """Whether the chunk computes that part of a prompt."""
    return text in decode(chunk.tokens)
