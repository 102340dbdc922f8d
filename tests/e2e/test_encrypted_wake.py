"""An encrypted server over HTTP: an agent wakes after a restart, in the words that it said before."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmarks.conversation import Conversation
from tests.live import strict_server

pytestmark = pytest.mark.timeout(300)

NAME = "kryptonaut"
QUESTION = "Say what the word is. " + " ".join(f"Line {n} has {n * n} words." for n in range(60))
REPLY = 12


def test_an_agent_wakes_from_an_encrypted_folder(tmp_path: Path) -> None:
    data, key_file = tmp_path / "sealed", tmp_path / "master.key"
    flags = ("--encryption", "file", "--encryption-key-file", str(key_file))
    with strict_server(data, *flags) as server, server.client() as client:
        first = Conversation(NAME).say(client, QUESTION, max_tokens=REPLY)
    log = (tmp_path / "sealed.log").read_text()
    assert "keep a copy" in " ".join(log.split())
    with strict_server(data, *flags) as server, server.client() as client:
        woken = Conversation(NAME).say(client, QUESTION, max_tokens=REPLY)
        health = client.get("/health").json()
    assert woken.text == first.text
    assert woken.prompt_tokens - woken.cached_tokens == 1
    assert (health["status"], health["encrypted"]) == ("ok", True)
    held = b"".join(path.read_bytes() for path in data.rglob("*") if path.is_file())
    assert len(list((data / "sealed-blocks").rglob("*.safetensors"))) >= 5
    assert NAME.encode() not in held
    assert key_file.read_text().strip() not in log
