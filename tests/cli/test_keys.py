"""`dormouse keys`, and the commands that send a key."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.api.conftest import Service, serving
from tests.cli.test_commands import run

from dormouse.api.edge import Edge
from dormouse.api.keys import KeyRing
from dormouse.runtimes.fake import FakeRuntime


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[Service]:
    """A running server that watches its key file."""
    (tmp_path / "data").mkdir()
    with serving(tmp_path, FakeRuntime(64), Edge(keys=KeyRing(tmp_path / "data"))) as service:
        yield service


def test_keys_are_made_listed_and_revoked_while_the_server_runs(guarded: Service) -> None:
    folder = ("--data-dir", str(guarded.store_folder))
    assert "everybody" in run("keys", "list", *folder)
    output = run("keys", "add", "--tenant", "team-a", "--name", "laptop", *folder)
    key = output.splitlines()[0]
    assert key.startswith("dm-")
    assert "only a digest" in output
    assert "closed from now on" in output
    assert guarded.http.get("/v1/models").status_code == 401
    guarded.http.headers["x-api-key"] = key
    assert guarded.http.get("/v1/models").status_code == 200
    (row,) = json.loads(run("keys", "list", "--json", *folder))
    assert (row["tenant"], row["name"], row["admin"], row["revoked_at"]) == ("team-a", "laptop", False, "")
    assert row["used_at"] != "never"
    assert key not in run("keys", "list", *folder)
    second = run("keys", "add", "--admin", *folder)
    assert "closed from now on" not in second
    assert "last valid key" not in run("keys", "revoke", row["id"], *folder)
    assert guarded.http.get("/v1/models").status_code == 401
    admin_id = json.loads(run("keys", "list", "--json", *folder))[1]["id"]
    assert "last valid key" in run("keys", "revoke", admin_id, *folder)
    assert "dormouse keys list" in run("keys", "revoke", admin_id, *folder, code=1)
    assert "tenant" in run("keys", "add", "--tenant", "a/b", *folder, code=1)


def test_commands_send_the_key(guarded: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    folder = ("--data-dir", str(guarded.store_folder))
    where = ("--port", guarded.url.rsplit(":", 1)[1])
    key = run("keys", "add", "--tenant", "team-a", *folder).splitlines()[0]
    assert "no API key" in run("chat", "me", *where, text="hello\n", code=1)
    assert "no API key" in run("agents", "ls", *folder, *where, code=1)
    monkeypatch.setenv("DORMOUSE_API_KEY", key)
    run("chat", "me", *where, "--max-tokens", "3", text="hello\n")
    (agent,) = json.loads(run("agents", "ls", "--json", *folder, *where))
    assert agent["id"] == "me"
    assert "not valid" in run("agents", "ls", *folder, *where, "--api-key", "dm-wrong", code=1)


def test_serving_other_machines_without_a_key_is_refused(tmp_path: Path) -> None:
    output = run("serve", "--host", "0.0.0.0", "--port", "0", "--data-dir", str(tmp_path), code=1)
    assert "dormouse keys add" in output
    assert "--insecure" in output
    assert not (tmp_path / "blocks").exists(), "nothing was opened"


def test_a_damaged_key_file_stops_the_start(tmp_path: Path) -> None:
    (tmp_path / "keys.json").write_text("{")
    assert "keys.json" in run("serve", "--port", "0", "--data-dir", str(tmp_path), code=1)
