"""Files are their owner's only, and nothing that is secret leaves by the side: a workload with canaries."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from benchmarks.server import Server, serve

from dormouse.api.keys import KeyFile
from dormouse.cli.agent_source import _write
from dormouse.store.file_ops import FileOps
from dormouse.store.opening import make_private

pytestmark = [pytest.mark.usefixtures("smollm2"), pytest.mark.timeout(600)]

CANARIES = {
    name: f"canary-{name}-5f1e9a"
    for name in ("prompt", "system", "tool", "result", "schema", "answer", "metadata")
}
CANARIES |= {"wrong-key": "dm-00000000-" + "canarykey" + "x" * 34, "header": "canary-header-5f1e9a"}
CITY = {"type": "object", "properties": {"city": {"type": "string", "description": CANARIES["schema"]}}}


@pytest.fixture
def open_umask() -> Iterator[None]:
    """The worst that a user can have set."""
    before = os.umask(0)
    yield
    os.umask(before)


@dataclass
class Workload:
    """A server that everything was asked of, what it printed, and what it said of itself."""

    data: Path
    out: Path
    log: Path
    keys: list[str]
    open_files: set[str] = field(default_factory=set)
    told: str = ""


@pytest.fixture(scope="module")
def workload(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workload]:
    """Chats, tools, errors, agents, exports and a sudden end, with the log at its most talkative."""
    place = tmp_path_factory.mktemp("files")
    before = os.umask(0)
    try:
        data = place / "made" / "here" / "data"
        file = KeyFile(data)
        keys = [file.add("a", is_admin=True), file.add("b")]
        work = Workload(data, place / "out", place / "server.log", keys)
        work.out.mkdir()
        flags = ("--arena-tokens", "2048", "--log-level", "debug", "--log-format")
        with serve(data, *flags, "json", log=work.log) as server:
            ask_everything(server, work)
            walk_open_files(server, work)
            server.kill()
        with serve(data, *flags, "text", log=work.log) as server, client_of(server, keys[0]) as http:
            said = [{"role": "user", "content": CANARIES["prompt"]}]
            for limit in (4, CANARIES["prompt"]):
                body = {"model": "smollm2", "messages": said, "max_tokens": limit}
                http.post("/v1/chat/completions", json=body, headers={"x-agent-id": "me"})
            work.told += http.get("/v1/agents").text
            server.stop()
        yield work
    finally:
        os.umask(before)


def client_of(server: Server, key: str) -> httpx.Client:
    return httpx.Client(base_url=server.url, headers={"x-api-key": key}, timeout=120)


def ask_everything(server: Server, work: Workload) -> None:
    """What clients do, right and wrong; what comes back beside the replies goes into `told`."""
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": CANARIES["system"]},
        {"role": "user", "content": CANARIES["prompt"]},
        {"role": "assistant", "content": CANARIES["answer"], "tool_calls": [call()]},
        {"role": "tool", "tool_call_id": "c", "content": CANARIES["result"]},
        {"role": "user", "content": "go on"},
    ]
    tools = [
        {"type": "function", "function": {"name": "t", "description": CANARIES["tool"], "parameters": CITY}}
    ]
    chat: dict[str, Any] = {
        "model": "smollm2",
        "messages": messages,
        "tools": tools,
        "max_tokens": 8,
        "temperature": 0,
    }
    headers = {"x-secret": CANARIES["header"], "cookie": CANARIES["header"], "x-agent-id": "me"}
    with client_of(server, work.keys[0]) as http:
        http.post("/v1/chat/completions", json=chat, headers=headers).raise_for_status()
        http.post("/v1/chat/completions", json=chat | {"stream": True}, headers=headers).raise_for_status()
        strict = {
            "type": "json_schema",
            "json_schema": {"schema": CITY | {"x": CANARIES["schema"]}, "strict": False},
        }
        http.post("/v1/chat/completions", json=chat | {"tools": [], "response_format": strict})
        body = {"model": "smollm2", "input": CANARIES["prompt"], "metadata": {"a": CANARIES["metadata"]}}
        http.post("/v1/responses", json=body | {"max_output_tokens": 4}).raise_for_status()
        http.post(
            "/v1/agents", json={"name": "kept", "system": CANARIES["system"], "tools": tools}
        ).raise_for_status()
        said = {"messages": [{"role": "user", "content": CANARIES["prompt"]}], "max_tokens": 4}
        http.post("/v1/agents/kept/messages", json=said).raise_for_status()
        http.post("/v1/agents/kept/checkpoints", json={"name": "t"}).raise_for_status()
        exported = http.get("/v1/agents/kept/export").raise_for_status().content
        http.post("/v1/agents/import?name=again", content=exported).raise_for_status()
        http.post("/v1/agents/me/sleep").raise_for_status()
        http.delete("/v1/agents/again").raise_for_status()
        # Errors of every kind, each with something secret in what was sent.
        wrong: list[dict[str, Any]] = [
            chat | {"messages": [{"role": CANARIES["prompt"], "content": "x"}]},
            chat | {"messages": [{"role": "user", "content": {"a": CANARIES["prompt"]}}]},
            chat | {"max_tokens": CANARIES["prompt"]},
            chat | {"messages": [{"role": "user", "content": CANARIES["prompt"] * 3000}]},
        ]
        answers = [http.post("/v1/chat/completions", json=body) for body in wrong]
        answers.append(http.post("/v1/chat/completions", content=f'{{"a": "{CANARIES["prompt"]}"'))
        answers += [http.get("/metrics"), http.get("/health"), http.get("/admin/state")]
        with client_of(server, CANARIES["wrong-key"]) as stranger:
            answers += [stranger.get("/v1/models"), stranger.post("/v1/messages", json=chat)]
        assert [answer.status_code for answer in answers[:5]] == [400] * 5
        work.told += "".join(answer.text + str(answer.headers) for answer in answers)
    environment = os.environ | {"DORMOUSE_API_KEY": work.keys[0]}
    port = server.url.rpartition(":")[2]
    command = [
        "-m",
        "dormouse",
        "agents",
        "export",
        "me",
        str(work.out / "me.agent"),
        "--data-dir",
        str(work.data),
    ]
    done = subprocess.run(
        [sys.executable, *command, "--port", port],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    work.told += done.stdout + done.stderr


def call() -> dict[str, Any]:
    return {
        "id": "c",
        "type": "function",
        "function": {"name": "t", "arguments": json.dumps({"city": CANARIES["result"]})},
    }


def walk_open_files(server: Server, work: Workload) -> None:
    """While the server runs: its log of changes, locks and temporary files are there."""
    for path in work.data.rglob("*"):
        with suppress(FileNotFoundError):  # it may be gone since it was listed
            mode = stat.S_IMODE(path.lstat().st_mode)
            if mode & 0o077:
                work.open_files.add(f"{path.name} {mode:o} (running)")
    for fd in Path(f"/proc/{server.pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            target = fd.readlink()
            if work.data in target.parents and stat.S_IMODE(fd.stat().st_mode) & 0o077:
                work.open_files.add(f"{target} (open)")


def test_everything_below_the_data_folder_is_its_owners(workload: Workload) -> None:
    """Folders 0700, files 0600, whatever the umask; also those that were there only while it ran."""
    seen = [workload.data, workload.data.parent, workload.data.parent.parent, *workload.data.rglob("*")]
    for path in seen:
        expected = 0o700 if path.is_dir() else 0o600
        assert stat.S_IMODE(path.lstat().st_mode) == expected, path
    names = {path.name for path in seen}
    assert {"catalog.sqlite", "keys.json", "keys.lock", "keys-used.json", "store.lock", "blocks"} <= names
    assert workload.open_files == set()


def test_files_that_commands_write_are_their_owners(workload: Workload) -> None:
    (exported,) = workload.out.iterdir()
    assert stat.S_IMODE(exported.stat().st_mode) == 0o600
    assert exported.stat().st_size > 10_000


def test_nothing_secret_is_logged_counted_or_quoted(workload: Workload) -> None:
    """Keys, headers, prompts, tool results, schemas: in no line of any level, no metric, no error."""
    log = workload.log.read_text()
    assert "outcome" in log, "the log is there"
    for name, canary in CANARIES.items():
        assert canary not in log, (name, [line for line in log.splitlines() if canary in line][:3])
        assert canary not in workload.told, name
    for key in workload.keys:
        assert key not in log + workload.told
        assert key.split("-", 2)[2] not in log + workload.told


def test_secrets_lie_in_the_data_folder_only_as_they_must(workload: Workload) -> None:
    """What was said is in the catalog; keys, refused requests and headers are nowhere."""
    stored = b"".join(path.read_bytes() for path in workload.data.rglob("*") if path.is_file())
    assert CANARIES["system"].encode() in stored
    for key in (*workload.keys, CANARIES["wrong-key"], CANARIES["header"]):
        assert key.encode() not in stored


@pytest.mark.usefixtures("open_umask")
def test_a_file_that_is_there_is_not_written_into(tmp_path: Path) -> None:
    """Nor one that a link leads to."""
    _write(tmp_path / "new", iter([b"x"]))
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o600
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for name in ("new", "link"):
        with pytest.raises(Exception, match="cannot be written"):
            _write(tmp_path / name, iter([b"y"]))
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.usefixtures("open_umask")
def test_what_lacks_above_a_private_folder_is_private_too(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    make_private(tmp_path / "a" / "b" / "c", FileOps())
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (tmp_path, *tmp_path.rglob("*"))]
    assert modes == [0o755, 0o700, 0o700, 0o700]
    (tmp_path / "a" / "b" / "c").chmod(0o777)
    make_private(tmp_path / "a" / "b" / "c", FileOps())
    assert stat.S_IMODE((tmp_path / "a" / "b" / "c").stat().st_mode) == 0o700
