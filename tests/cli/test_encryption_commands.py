"""`dormouse store encrypt|decrypt|forget-tenant`, and what the other commands say of an encrypted folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.cli.test_commands import run
from tests.store.kit import CACHE, NAMESPACE, QUOTA, reply

from dormouse.store.block_store import BlockStore
from dormouse.store.vault_file import has_vault


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A plain folder with an agent of the tenant that commands see."""
    with BlockStore.open(tmp_path / "data", quota_nbytes=QUOTA) as store:
        store.register(NAMESPACE, CACHE, tenant="acme")
        reply(store, "ada", range(40))
    return tmp_path / "data"


def test_a_folder_is_encrypted_used_and_decrypted(data: Path, tmp_path: Path) -> None:
    folder = ("--data-dir", str(data))
    key = ("--encryption", "file", "--encryption-key-file", str(tmp_path / "master.key"))
    assert "run `dormouse store encrypt`" in run("store", "stats", *folder, *key, code=1)
    assert "say where the master key is" in run("store", "encrypt", *folder, code=1)
    done = json.loads(run("store", "encrypt", "--json", *folder, *key))
    assert (done["num_blocks"], done["num_agents"], done["num_lost"]) == (3, 1, 0)
    assert has_vault(data)
    assert "is encrypted" in run("store", "stats", *folder, code=1)
    assert "encrypted already" in run("store", "encrypt", *folder, *key, code=1)
    assert json.loads(run("store", "stats", "--json", *folder, *key))["encrypted"] is True
    assert json.loads(run("store", "verify", "--json", *folder, *key))["num_blocks"] == 3
    assert json.loads(run("agents", "ls", "--json", *folder, *key)) == []  # of another tenant than ours
    run("store", "decrypt", *folder, *key)
    assert not has_vault(data)
    assert json.loads(run("store", "stats", "--json", *folder))["num_agents"] == 1
    assert "is not encrypted" in run("store", "decrypt", *folder, *key, code=1)


def test_a_tenant_is_forgotten(data: Path, tmp_path: Path) -> None:
    folder = ("--data-dir", str(data))
    key = ("--encryption", "file", "--encryption-key-file", str(tmp_path / "master.key"))
    run("store", "encrypt", *folder, *key)
    assert "no tenant 'nobody'" in run("store", "forget-tenant", "nobody", "--yes", *folder, *key, code=1)
    run("store", "forget-tenant", "acme", *folder, *key, text="n\n", code=1)
    assert json.loads(run("store", "stats", "--json", *folder, *key))["num_agents"] == 1
    assert "0 agents" in run("store", "forget-tenant", "acme", *folder, *key, text="y\n")
    found = json.loads(run("store", "stats", "--json", *folder, *key))
    assert (found["num_agents"], found["num_blocks"]) == (0, 0)


def test_a_key_in_the_data_folder_is_refused(tmp_path: Path) -> None:
    folder = ("--data-dir", str(tmp_path / "data"))
    key = ("--encryption", "file", "--encryption-key-file", str(tmp_path / "data" / "keys" / "master.key"))
    assert "lies in the data folder" in run("store", "stats", *folder, *key, code=1)
    assert not (tmp_path / "data").exists()


def test_doctor_says_whether_it_is_on(data: Path, tmp_path: Path) -> None:
    folder = ("--data-dir", str(data), "--json")
    key = ("--encryption", "file", "--encryption-key-file", str(tmp_path / "master.key"))
    assert json.loads(run("doctor", *folder))["encryption"] == "off"
    assert json.loads(run("doctor", *folder, *key))["encryption"].startswith("asked for")
    run("store", "encrypt", *folder[:2], *key)
    assert json.loads(run("doctor", *folder, *key))["encryption"].startswith("on, with the key file")
    assert "no key" in json.loads(run("doctor", *folder))["encryption"]
    (tmp_path / "master.key").rename(tmp_path / "elsewhere.key")
    assert "has no key for it" in json.loads(run("doctor", *folder, *key))["encryption"]
