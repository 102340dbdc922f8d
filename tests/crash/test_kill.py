"""Whatever step a crash hits, the store opens and holds what it promised."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.crash.workload import HISTORIES, master_key
from tests.store.kit import CACHE, NAMESPACE, QUOTA, agent_id, links_of, load, nbytes_below, ram_folder, reply

from dormouse.store.block_store import BlockStore
from dormouse.store.master_key import MasterKeyFile

ROOT = Path(__file__).parents[2]
MIN_STEPS = 60


def start(module: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def assert_sound(folder: Path, keys: MasterKeyFile | None = None) -> BlockStore:
    """Open what a crash left, assert all invariants, give the open store."""
    store = BlockStore.open(folder, quota_nbytes=QUOTA, key_source=keys)
    store.register(NAMESPACE, CACHE, tenant="acme")
    store.check()
    assert store.verify().is_clean
    assert store.stats().notes == ()
    assert not list(folder.rglob("*.tmp"))
    assert not list((folder / "quarantine").iterdir()), "a crash damages nothing"
    assert store.stats().nbytes == nbytes_below(folder)
    for agent in store.agents():
        history = store.history(agent.id)
        assert len(history) == agent.num_tokens
        for key in store.chain(agent.id):
            assert not store.contains(key) or load(store, key)[0] is None
    return store


def versions(name: str) -> list[list[int]]:
    return [[*tokens, number] for number, (agent, tokens) in enumerate(HISTORIES) if agent == name]


def assert_as_told(store: BlockStore, told: list[str]) -> None:
    """Every agent is as it was said to be, or as one of the updates after that."""
    for name in ("ada", "bob"):
        known = [int(line.split()[1]) for line in told if line.startswith("saved")]
        allowed = [v for v in versions(name) if not any(v[-1] < n and HISTORIES[n][0] == name for n in known)]
        exists = any(agent.id.name == name for agent in store.agents())
        if exists:
            assert store.history(agent_id(name)) in allowed
            assert not (name == "bob" and "deleted bob" in told)
        else:
            was_saved = any(HISTORIES[n][0] == name for n in known)
            assert not was_saved or (name == "bob" and "deleting bob" in told)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", ["plain", "sealed"])
@pytest.mark.parametrize("how", ["kill", "power"])
def test_killed_at_every_step(how: str, kind: str) -> None:
    with ram_folder() as base:
        process = start("tests.crash.workload", str(base), how, kind)
        _, errors = process.communicate(timeout=500)
        assert process.returncode == 0, errors
        folders = sorted(base.iterdir(), key=lambda path: int(path.name))
        assert len(folders) > MIN_STEPS
        for folder in folders:
            assert_survived(folder, master_key(folder) if kind == "sealed" else None)


def assert_survived(folder: Path, keys: MasterKeyFile | None) -> None:
    told = (folder / "told").read_text().splitlines() if (folder / "told").exists() else []
    with assert_sound(folder / "data", keys) as store:
        assert_as_told(store, told)
        if "deleted bob" in told:
            bobs = links_of(versions("bob")[-1][:-1])[1:]
            assert not any(store.contains(link.key) for link in bobs), "deleted content came back"
        reply(store, "next", range(50))
    with assert_sound(folder / "data", keys) as store:
        assert all(store.has_durable(link.key) for link in links_of(range(50)))


def test_sigkill_at_any_moment(tmp_path: Path) -> None:
    for num_lines in (1, 7, 30):
        folder = tmp_path / str(num_lines)
        process = start("tests.crash.endless", str(folder))
        assert process.stdout is not None
        told = [process.stdout.readline().strip() for _ in range(num_lines)]
        process.send_signal(signal.SIGKILL)
        rest, errors = process.communicate(timeout=20)
        assert errors == ""
        told += rest.split()
        with assert_sound(folder) as store:
            for agent in store.agents():
                said = [int(line.split("=")[1]) for line in told if line.startswith(f"{agent.id.name}=")]
                assert agent.num_tokens >= max(said, default=0)
                assert store.history(agent.id) == list(range(agent.num_tokens))
            assert {line.split("=")[0] for line in told} <= {agent.id.name for agent in store.agents()}
