"""An agent's file: out of one store, into another, whole or not at all."""

from __future__ import annotations

import io
import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors import safe_open
from tests.store.kit import (
    BLOCK_SIZE,
    CACHE,
    QUOTA,
    FailingOps,
    OpenStore,
    agent_id,
    block_files,
    block_path,
    links_of,
    load,
    payload_of,
    put_all,
    ram_folder,
    reply,
    save,
    update_of,
)

from dormouse.domain.agents import AgentId
from dormouse.domain.blocks import namespace_of
from dormouse.domain.cache_spec import CacheSpec, KVFormat
from dormouse.domain.errors import (
    AgentExists,
    AgentNotFound,
    ArchiveInvalid,
    ArchiveMismatch,
    DamagedBlock,
    InvalidRequest,
    StoreError,
)
from dormouse.store.block_store import BlockStore
from dormouse.store.identity import Identity

TALK = list(range(100, 100 + 2 * BLOCK_SIZE + 5))
LONGER = [*TALK, *range(900, 930)]
IDENTITY = Identity("toy model", CACHE)
HERE = namespace_of("toy model", CACHE.fingerprint(), "acme")
THERE = IDENTITY.namespace("home")


@pytest.fixture
def source(store: BlockStore) -> BlockStore:
    """A store with an agent that has two checkpoints, one of them off its chain."""
    store.register(HERE, CACHE, "toy model")
    reply(store, "ada", TALK, rest=[1, 2])
    store.notebook.put("acme", "agent", "ada", b'{"system": "be brief"}')
    store.notebook.put("acme", "transcript", "ada", b'["then"]')
    store.admin.tag("acme", "ada", "then")
    reply(store, "ada", LONGER)
    store.admin.tag("acme", "ada", "far")
    store.notebook.put("acme", "transcript", "ada", b'["now"]')
    reply(store, "ada", [*TALK, 5, 6, 7, 8])
    return store


@pytest.fixture
def other() -> Iterator[BlockStore]:
    with ram_folder() as place, BlockStore.open(place / "other", quota_nbytes=QUOTA) as store:
        yield store


def exported(store: BlockStore, name: str = "ada") -> bytes:
    export = store.admin.export("acme", name)
    body = b"".join(export)
    assert len(body) == export.nbytes
    return body


def take(store: BlockStore, body: bytes, name: str | None = None, *, overwrite: bool = False) -> AgentId:
    agent = store.admin.load(
        io.BytesIO(body), len(body), "home", name=name, expected=IDENTITY, overwrite=overwrite
    )
    return agent.id


def test_an_agent_moves_to_another_store_and_tenant(source: BlockStore, other: BlockStore) -> None:
    source.admin.configure("acme", "ada", quota_nbytes=1 << 30)
    here = take(other, exported(source))
    assert here == AgentId("home", "ada", THERE)
    agent = other.agent("home", "ada")
    assert agent.durable_tokens == agent.num_tokens == len(TALK) + 4
    assert (agent.quota_nbytes, agent.num_checkpoints, agent.pinned) == (1 << 30, 2, False)
    assert other.history(here) == [*TALK, 5, 6, 7, 8]
    assert other.notebook.get("home", "agent", "ada") == b'{"system": "be brief"}'
    for old, new in zip(links_of([*TALK, 5, 6, 7, 8]), links_of([*TALK, 5, 6, 7, 8], THERE), strict=True):
        assert load(other, new.key) == (None, payload_of(old.key))
    other.admin.rollback("home", "ada", "far")
    assert other.history(here) == LONGER
    other.admin.rollback("home", "ada", "then")
    assert other.history(here) == [*TALK, 1, 2]
    assert other.notebook.get("home", "transcript", "ada") == b'["then"]'
    assert other.verify().is_clean


def test_an_import_gets_another_name_and_overwrites_only_when_told(
    source: BlockStore, other: BlockStore
) -> None:
    body = exported(source)
    take(other, body)
    with pytest.raises(AgentExists):
        take(other, body)
    take(other, body, "eve")
    assert other.history(other.agent("home", "eve").id) == [*TALK, 5, 6, 7, 8]
    other.admin.untag("home", "ada", "far")
    other.notebook.put("home", "why", "ada", b"{}")
    other.admin.rollback("home", "ada", "then")
    take(other, body, overwrite=True)
    assert len(other.admin.tags("home", "ada")) == 2
    assert other.history(other.agent("home", "ada").id) == [*TALK, 5, 6, 7, 8]
    assert other.notebook.get("home", "why", "ada") is None
    with pytest.raises(InvalidRequest):
        take(other, body, "\n")


def test_what_only_a_replaced_checkpoint_needed_goes(source: BlockStore, other: BlockStore) -> None:
    take(other, exported(source))
    assert other.stats().num_history_only > 0, "where a stored block starts as an unfinished one does"
    source.admin.rollback("acme", "ada", "far")
    source.admin.untag("acme", "ada", "then")
    source.admin.tag("acme", "ada", "then")
    take(other, exported(source), overwrite=True)
    assert other.stats().num_history_only == 0
    other.admin.rollback("home", "ada", "then")
    assert other.history(other.agent("home", "ada").id) == LONGER


def test_an_agent_that_said_nothing_moves_too(source: BlockStore, other: BlockStore) -> None:
    source.admin.create(AgentId("acme", "new", HERE), "toy", documents={"agent": b"{}"})
    here = take(other, exported(source, "new"))
    assert other.history(here) == []
    assert other.notebook.get("home", "agent", "new") == b"{}"


def test_history_without_blocks_moves_too(open_store: OpenStore, other: BlockStore) -> None:
    store = open_store()
    store.register(HERE, CACHE, "toy model")
    store.save_agent(update_of("ada", links_of(TALK), [3]))
    here = take(other, exported(store))
    assert other.history(here) == [*TALK, 3]
    assert other.agent("home", "ada").durable_tokens == 0


def test_blocks_that_came_before_their_parents_move_too(store: BlockStore, other: BlockStore) -> None:
    store.register(HERE, CACHE, "toy model")
    links = links_of(TALK)
    put_all(store, links[1:])
    assert store.flush()
    put_all(store, links[:1])
    assert save(store, "ada", links)
    here = take(other, exported(store))
    assert other.history(here) == TALK
    assert other.agent("home", "ada").durable_tokens == len(TALK)


def test_safetensors_reads_it(source: BlockStore, tmp_path: Path) -> None:
    path = tmp_path / "ada"
    path.write_bytes(exported(source))
    with safe_open(path, "numpy") as file:
        assert set(file.keys()) == {"tokens", "documents", "blocks", "digest"}
        assert file.get_tensor("blocks").shape[1] == CACHE.block_nbytes
        assert json.loads(file.metadata()["manifest"])["name"] == "ada"


def test_another_model_or_format_is_refused_and_both_are_named(source: BlockStore) -> None:
    body = exported(source)
    others = [
        (Identity("other model", CACHE), "toy model.*other model"),
        (
            Identity(
                "toy model",
                CacheSpec.for_heads(
                    KVFormat.Q8, 32, num_layers=2, num_kv_heads=1, k_head_dim=64, v_head_dim=64
                ),
            ),
            "k8v4 block=16.*q8 block=32.*--kv-format k8v4 --block-size 16",
        ),
    ]
    for identity, words in others:
        with pytest.raises(ArchiveMismatch, match=words):
            source.admin.load(io.BytesIO(body), len(body), "home", expected=identity)


def test_no_flipped_bit_and_no_cut_gets_in(source: BlockStore, other: BlockStore) -> None:
    body = exported(source)
    header = 8 + int.from_bytes(body[:8], "little")
    places = {*range(0, header, 97), *range(header, len(body), 1009), 0, header - 1, len(body) - 1}
    for place in places:
        damaged = bytearray(body)
        damaged[place] ^= 4
        with pytest.raises((ArchiveInvalid, ArchiveMismatch)):
            take(other, bytes(damaged))
    for length in (0, 7, 8, header - 1, header, len(body) // 2, len(body) - 1):
        with pytest.raises(ArchiveInvalid):
            take(other, body[:length])
    with pytest.raises(ArchiveInvalid):
        take(other, body + b"\0")
    assert (other.agents(), other.stats().num_blocks) == ([], 0)


def remade(body: bytes, old: str, new: str) -> bytes:
    """The file with another text in its manifest."""
    length = int.from_bytes(body[:8], "little")
    table = json.loads(body[8 : 8 + length])
    manifest = table["__metadata__"]["manifest"]
    assert old in manifest
    table["__metadata__"]["manifest"] = manifest.replace(old, new)
    text = json.dumps(table).encode()
    padded = text.ljust(-(-(8 + len(text)) // 8) * 8 - 8)
    return len(padded).to_bytes(8, "little") + padded + body[8 + length :]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("layers=2", "layers=2000000000"),
        ("block=16", "block=17"),
        ('"tip": ', '"tip": 9'),
        ("[-1, 16,", "[-1, 160000000000000,"),
        ("[-1, 16,", "[5, 16,"),
        ("[-1, 16,", "[-1, 15,"),
        ('"checkpoints": [["then"', '"checkpoints": [["far"'),
        ('["agent", "",', '["payroll", "",'),
        ('"rest": []', '"rest": [-1]'),
        ('"quota_bytes": 0', '"quota_bytes": "0"'),
        ('"quota_bytes": 0', '"quota_bytes": ' + "[" * 50_000),
        ('"model": "toy"', '"model": "\\ud800"'),
        ("[1, 2]", f"[1, {1 << 32}]"),
        ('"parent": ""', '"parent": "\\udfff"'),
        ('"name": "ada"', '"name": "\\ud800"'),
    ],
)
def test_manifests_that_cannot_be(source: BlockStore, other: BlockStore, old: str, new: str) -> None:
    with pytest.raises((ArchiveInvalid, ArchiveMismatch)):
        take(other, remade(exported(source), old, new))


@pytest.mark.parametrize("time", ["Infinity", "NaN", "-1.0", "1e+300", "true"])
def test_a_time_that_cannot_be(source: BlockStore, other: BlockStore, time: str) -> None:
    first = source.admin.tags("acme", "ada")[0].created_at
    with pytest.raises(ArchiveInvalid, match="is not a time"):
        take(other, remade(exported(source), repr(first), time))


def test_another_model_is_refused_before_its_payloads_are_read(source: BlockStore) -> None:
    body = exported(source)
    head = body[: 8 + int.from_bytes(body[:8], "little")]
    with pytest.raises(ArchiveMismatch):
        source.admin.load(io.BytesIO(head), len(head), "home", expected=Identity("other model", CACHE))


def test_a_value_that_the_catalog_cannot_hold_costs_one_answer(source: BlockStore) -> None:
    far = AgentId("acme", "far", HERE)
    with pytest.raises(StoreError, match="cannot hold"):
        source.admin.create(far, "toy", quota_nbytes=1 << 70)
    with pytest.raises(AgentNotFound):
        source.agent("acme", "far")
    source.admin.create(far, "toy")


@pytest.mark.parametrize("step", ["commit", "write", "rename", "fsync_folder"])
def test_an_import_that_is_cut_leaves_the_store_as_before(
    source: BlockStore, tmp_path: Path, step: str
) -> None:
    body = exported(source)
    ops = FailingOps()
    with BlockStore.open(tmp_path / "other", quota_nbytes=QUOTA, file_ops=ops) as other:
        other.flush()
        ops.errors[step] = sqlite3.OperationalError("I/O") if step == "commit" else OSError(5, "I/O error")
        with pytest.raises(StoreError):
            take(other, body)
        ops.errors.clear()
        with pytest.raises(AgentNotFound):
            other.agent("home", "ada")
        assert other.flush()
        assert block_files(tmp_path / "other") == set()
        take(other, body)
    with BlockStore.open(tmp_path / "other", quota_nbytes=QUOTA) as other:
        assert other.agent("home", "ada").durable_tokens == len(TALK) + 4


def test_an_import_whose_last_step_fails_takes_its_blocks_back(
    source: BlockStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = exported(source)

    def fail(*_: object, **__: object) -> None:
        raise StoreError("the last step failed")

    with BlockStore.open(tmp_path / "other", quota_nbytes=QUOTA) as other:
        monkeypatch.setattr(
            other.admin._book, "adopt", lambda *_, **__: (_ for _ in ()).throw(StoreError("no"))
        )
        with pytest.raises(StoreError):
            take(other, body)
        assert (other.stats().num_blocks, block_files(tmp_path / "other")) == (0, set())


def test_an_import_that_is_too_large_is_refused(source: BlockStore, tmp_path: Path) -> None:
    body = exported(source)
    with (
        BlockStore.open(tmp_path / "other", quota_nbytes=len(body)) as other,
        pytest.raises(StoreError, match="disk quota"),
    ):
        take(other, body)


def test_a_damaged_block_is_not_exported(source: BlockStore, folder: Path) -> None:
    path = block_path(folder, links_of(TALK)[0].key)
    data = bytearray(path.read_bytes())
    data[5000] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedBlock):
        exported(source)


def test_only_an_agent_whose_model_is_known_is_exported(store: BlockStore) -> None:
    other = namespace_of("x")
    store.register(other, CACHE)
    store.admin.create(AgentId("acme", "old", other), "toy")
    with pytest.raises(StoreError, match="older version"):
        store.admin.export("acme", "old")
    with pytest.raises(AgentNotFound):
        store.admin.export("acme", "nobody")
    assert agent_id("x")
