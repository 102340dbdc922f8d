"""The application over the fake runtime, with a tokenizer of bytes."""

from __future__ import annotations

import queue
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from tests.engine.harness import opened
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from dormouse.api.app import create_app
from dormouse.api.edge import Edge
from dormouse.api.server import Server, Stoppable, bind
from dormouse.models.chat import ChatModel
from dormouse.models.chat_template import ChatTemplate
from dormouse.models.host import ModelHost
from dormouse.models.served import ServedModel
from dormouse.runtimes.fake import EOS, FakeRuntime
from dormouse.store.block_store import BlockStore

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def byte_tokenizer() -> Tokenizer:
    """Token ids are bytes, as the fake runtime has them."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {byte: chr(byte) for byte in printable}
    characters |= {byte: chr(256 + index) for index, byte in enumerate(others)}
    tokenizer = Tokenizer(models.BPE({character: byte for byte, character in characters.items()}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<end>", special=True)])
    assert tokenizer.token_to_id("<end>") == EOS
    return tokenizer


@dataclass
class Service:
    """A server on a free port, what is behind it, and a client."""

    url: str
    served: ServedModel
    store: BlockStore
    http: httpx.Client
    store_folder: Path
    host: ModelHost

    def chat(self, text: str = "hello", **fields: Any) -> httpx.Response:
        """A chat completion with one user message; greedy, eight tokens, unless told otherwise."""
        messages = [{"role": "user", "content": text}]
        body = {"model": "fake", "messages": messages, "temperature": 0, "max_tokens": 8} | fields
        return self.http.post("/v1/chat/completions", json=body)


@pytest.fixture
def runtime(request: pytest.FixtureRequest) -> FakeRuntime:
    """A fresh runtime; tests may name another class of them."""
    return getattr(request, "param", FakeRuntime)(64)


@pytest.fixture
def service(tmp_path: Path, runtime: FakeRuntime) -> Iterator[Service]:
    with serving(tmp_path, runtime) as service:
        yield service


@contextmanager
def serving(
    tmp_path: Path,
    runtime: FakeRuntime,
    around: Edge | None = None,
    *,
    max_running: int = 2,
    max_queue: int = 2,
) -> Iterator[Service]:
    """A server over the data folder `data`; `around` is its edge."""
    chat = ChatModel(byte_tokenizer(), ChatTemplate({"default": TEMPLATE}, {}), frozenset({EOS}))
    store = BlockStore.open(tmp_path / "data", quota_nbytes=1 << 30)
    with opened(
        tmp_path,
        store=store,
        runtime=runtime,
        new_decoder=chat.decode_stream,
        max_queue=max_queue,
        max_running=max_running,
    ) as client:
        served = ServedModel("fake", 1_700_000_000, chat, client.engine, 30.0)
        host = ModelHost(served)
        app = create_app(host, store, max_body_nbytes=100_000, around=around)
        with running(app, client.engine) as url, httpx.Client(base_url=url, timeout=30) as http:
            yield Service(url, served, store, http, tmp_path / "data", host)


@contextmanager
def running(
    app: FastAPI, requests: Stoppable, load: Callable[[], Awaitable[None]] | None = None
) -> Iterator[str]:
    """The server in a thread of its own; ended at the end. With `load`, it is given while that goes on."""
    ready: queue.SimpleQueue[str] = queue.SimpleQueue()
    listener = bind("127.0.0.1", 0)
    server = Server(app, requests, grace_s=0, on_ready=ready.put, load=load)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        yield ready.get(timeout=20) if load is None else "http://{}:{}".format(*listener.getsockname())
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()
        listener.close()
