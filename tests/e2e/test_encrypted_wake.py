"""An encrypted server over HTTP: agents wake after a restart, in the words of one that is not encrypted."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmarks.conversation import Conversation
from tests.live import strict_server

pytestmark = pytest.mark.timeout(300)

NAME = "kryptonaut"
QUESTION = "Say what the word is. " + " ".join(f"Line {n} has {n * n} words." for n in range(60))
REPLY = 12


def test_agents_wake_from_an_encrypted_folder(tmp_path: Path) -> None:
    key = ("--encryption", "file", "--encryption-key-file", str(tmp_path / "master.key"))
    said = {}
    for name, flags in (("plain", ()), ("sealed", key)):
        data = tmp_path / name
        # Once in a first process, once in one that finds it on the disk.
        with strict_server(data, *flags) as server, server.client() as client:
            first = Conversation(NAME).say(client, QUESTION, max_tokens=REPLY)
        with strict_server(data, *flags) as server, server.client() as client:
            again = Conversation(NAME).say(client, QUESTION, max_tokens=REPLY)
            health = client.get("/health").json()
            assert health["status"] == "ok"
            assert health["encrypted"] == bool(flags)
        assert again.prompt_tokens - again.cached_tokens == 1
        said[name] = (first.text, again.text)
    assert said["plain"] == said["sealed"]
    assert len(set(said["sealed"])) == 1
    held = {kind: b"".join(path.read_bytes() for path in files_of(tmp_path / kind)) for kind in said}
    assert NAME.encode() in held["plain"]
    assert NAME.encode() not in held["sealed"]
    assert (tmp_path / "master.key").read_text().strip() not in (tmp_path / "sealed.log").read_text()


def files_of(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]
