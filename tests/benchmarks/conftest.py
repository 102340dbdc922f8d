"""Peers that are processes of the fake, and a scale that takes moments."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
from benchmarks.compare.peers import KVBudget, Launch, Peer, Slots
from benchmarks.compare.scale import SMALL, Scale

FAKE = Path(__file__).parent / "fake_peer.py"


def fake_peer(name: str, version: str | None = "1", *, ours: bool = False, slots: bool = False) -> Peer:
    """A peer whose server is the fake."""

    def launch(port: int, folder: Path, budget: KVBudget) -> Launch:
        del budget
        return Launch([sys.executable, str(FAKE), str(port), str(folder / name)])

    return Peer(
        name=name,
        version=version,
        weights="none",
        kv="none",
        kv_token_nbytes=1000,
        model="fake",
        launch=launch,
        slots=Slots("/slots/0?action=save", "/slots/0?action=restore") if slots else None,
        store=name if ours else None,
        ours=ours,
    )


@pytest.fixture
def scale() -> Scale:
    return dataclasses.replace(
        SMALL, prefill=(64,), decode_short=(32, (1, 2)), decode_long=(64, (1,)), decode_tokens=6,
        agents=3, agent_context=64, agents_that_fit=1, asleep=2, mixed_prompt=64,
    )  # fmt: skip
