"""A server on a disk that fails: replies go on in the same words; health, metrics and the log say what is
wrong; when the disk is mended, saving goes on by itself."""

from __future__ import annotations

import errno
import logging
import shutil
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from tests.api.conftest import TEMPLATE, byte_tokenizer, running
from tests.engine.harness import WAIT_S, opened
from tests.store.kit import FailingOps, FaultyOps, GatedOps

from dormouse.api.app import create_app
from dormouse.models.chat import ChatModel
from dormouse.models.chat_template import ChatTemplate
from dormouse.models.host import ModelHost
from dormouse.models.served import ServedModel
from dormouse.runtimes.fake import EOS, FakeRuntime
from dormouse.store.block_store import BlockStore
from dormouse.store.file_ops import FileOps
from dormouse.store.options import StoreOptions

QUOTA = 1 << 30
SLOW_S = 0.05
TURNS = ("the first thing", "the second thing, which is longer than a block", "the third thing")


@dataclass
class Site:
    """A server, and the store below it."""

    http: httpx.Client
    store: BlockStore
    folder: Path

    def say(self, text: str, agent: str = "ada") -> str:
        """What an agent replies to a turn of the conversation that the server keeps."""
        body = {"messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 24}
        answer = self.http.post(f"/v1/agents/{agent}/messages", json=body)
        assert answer.status_code == 200, answer.text
        reply: str = answer.json()["choices"][0]["message"]["content"]
        return reply

    def reasons(self) -> set[str]:
        """Why the server is degraded; what the machine's own disk lacks is left out."""
        answer = self.http.get("/health")
        assert answer.status_code == 200, "a degraded server serves"
        body = answer.json()
        codes = {reason["code"] for reason in body["reasons"]}
        assert body["status"] == ("degraded" if codes else "ok")
        assert self.http.get("/health/ready").status_code == 200
        return codes - {"disk_low"}

    def metric(self, name: str) -> float:
        """The value of a metric that has no labels."""
        lines = self.http.get("/metrics").text.splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith(f"{name} "))


@contextmanager
def site(base: Path, ops: FileOps, *, sync: bool = False, name: str = "data") -> Iterator[Site]:
    chat = ChatModel(byte_tokenizer(), ChatTemplate({"default": TEMPLATE}, {}), frozenset({EOS}))
    options = StoreOptions(retry_s=0.01)
    store = BlockStore.open(base / name, quota_nbytes=QUOTA, file_ops=ops, options=options)
    with opened(
        base, store=store, runtime=FakeRuntime(64), new_decoder=chat.decode_stream, sync=sync
    ) as client:
        served = ServedModel("fake", 1_700_000_000, chat, client.engine, 30.0)
        app = create_app(ModelHost(served), store, max_body_nbytes=100_000)
        with running(app, client.engine) as url, httpx.Client(base_url=url, timeout=30) as http:
            http.post("/v1/agents", json={"name": "ada"}).raise_for_status()
            yield Site(http, store, base / name)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What a server replies to which nothing happens."""
    with site(tmp_path_factory.mktemp("twin"), FileOps()) as twin:
        return [twin.say(text) for text in TURNS]


ERRORS = {
    "disk_full": (OSError(errno.ENOSPC, "No space left on device"), sqlite3.SQLITE_FULL),
    "store_read_only": (OSError(errno.EROFS, "Read-only file system"), sqlite3.SQLITE_READONLY),
    "write_failed": (OSError(errno.EIO, "Input/output error"), sqlite3.SQLITE_IOERR_FSYNC),
}


@pytest.mark.parametrize("code", ERRORS)
@pytest.mark.parametrize(
    "step", ["make_folder", "open_temp", "write", "fsync", "rename", "fsync_folder", "commit"]
)
def test_replies_go_on_and_everybody_is_told(
    tmp_path: Path, words: list[str], step: str, code: str, caplog: pytest.LogCaptureFixture
) -> None:
    file_error, sqlite_code = ERRORS[code]
    sqlite_error = sqlite3.OperationalError("the disk says no")
    sqlite_error.sqlite_errorcode = sqlite_code
    caplog.set_level(logging.INFO, "dormouse.store")
    ops = FailingOps()
    with site(tmp_path, ops) as server:
        assert server.say(TURNS[0]) == words[0]
        assert server.store.flush()
        ops.errors[step] = sqlite_error if step == "commit" else file_error
        # The folders of these blocks may be there already: another agent's are not.
        server.http.post("/v1/chat/completions", json=_elsewhere(), headers={"x-agent-id": "bob"})
        assert server.say(TURNS[1]) == words[1]
        assert not server.store.flush()
        assert server.reasons() == {code}
        assert any(r.getMessage().startswith("degraded: ") for r in caplog.records)
        assert server.metric("dormouse_store_failed_writes_total") > 0
        ops.errors.clear()
        assert server.say(TURNS[2]) == words[2]
        assert server.store.flush(), server.store.health()
        assert server.reasons() == set()
        assert any("can be written again" in r.getMessage() for r in caplog.records)
    with BlockStore.open(tmp_path / "data", quota_nbytes=QUOTA) as store:
        assert store.verify().is_clean
        agent = store.agent("default", "ada")
        assert agent.durable_tokens >= agent.num_tokens - 1


def _elsewhere() -> dict[str, object]:
    """A long prompt that nobody else has: blocks in many folders."""
    messages = [{"role": "user", "content": "something else entirely " * 40}]
    return {"model": "fake", "messages": messages, "temperature": 0, "max_tokens": 8}


def test_a_disk_that_hangs_holds_nobody_up(tmp_path: Path, words: list[str]) -> None:
    ops = GatedOps("fsync")
    with site(tmp_path, ops) as server:
        assert server.say(TURNS[0]) == words[0]
        assert server.store.flush()
        ops.gate.clear()
        body = {"model": "fake", "messages": [{"role": "user", "content": "x" * 600}], "max_tokens": 8}
        assert server.http.post("/v1/chat/completions", json=body).status_code == 200
        assert ops.reached.wait(WAIT_S)
        assert server.http.post("/v1/chat/completions", json=body).status_code == 200
        assert server.metric("dormouse_store_pending_bytes") > 0
        assert server.reasons() == set(), "slow is not broken"
        ops.gate.set()
        assert server.store.flush()
        assert server.metric("dormouse_store_pending_bytes") == 0
        assert server.say(TURNS[1]) == words[1]


@pytest.mark.parametrize("route", ["messages", "chat", "responses"])
def test_with_sync_all_of_a_reply_is_on_disk_when_it_is_told(
    tmp_path: Path, words: list[str], route: str
) -> None:
    """The blocks, the history, the exact tokens of the reply, the transcript, the stored response."""

    def slow(step: str, _: object) -> None:
        if step == "commit":
            time.sleep(SLOW_S)  # what is told too early is not there yet

    with site(tmp_path, FaultyOps(slow), sync=True) as server:
        if route == "messages":
            assert server.say(TURNS[0]) == words[0]
        elif route == "chat":
            chat = {"model": "fake", "messages": [{"role": "user", "content": TURNS[0]}], "max_tokens": 24}
            answer = server.http.post("/v1/chat/completions", json=chat, headers={"x-agent-id": "ada"})
            assert answer.status_code == 200
        else:
            response = {"model": "fake", "input": TURNS[0], "max_output_tokens": 24}
            answer = server.http.post("/v1/responses", json=response)
            assert answer.status_code == 200
        copied = tmp_path / "as a kill would leave it"
        shutil.copytree(server.folder, copied)
    with BlockStore.open(copied, quota_nbytes=QUOTA) as store:
        if route == "responses":
            assert store.notebook.get("default", "response", answer.json()["id"]) is not None
            return
        agent = store.agent("default", "ada")
        assert agent.durable_tokens >= agent.num_tokens - 1 > 0
    with closing_catalog(copied) as catalog:
        assert catalog.execute("SELECT count(*) FROM replies").fetchone() == (1,)
        kept = catalog.execute("SELECT count(*) FROM documents WHERE kind = 'transcript'").fetchone()
        assert kept == (1 if route == "messages" else 0,)


@contextmanager
def closing_catalog(folder: Path) -> Iterator[sqlite3.Connection]:
    connection = sqlite3.connect(folder / "catalog.sqlite")
    try:
        yield connection
    finally:
        connection.close()
