"""Encryption at rest: nothing readable lies in the folder, everything comes back, and no key means no."""

from __future__ import annotations

import io
import json
import logging
import sqlite3
import stat
import traceback
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from safetensors import safe_open
from tests.store.kit import (
    BLOCK_SIZE,
    CACHE,
    NAMESPACE,
    QUOTA,
    Clock,
    FaultyOps,
    UnsyncedOps,
    agent_id,
    assert_loads,
    links_of,
    load,
    nbytes_below,
    payload_of,
    put_all,
    ram_folder,
    reply,
    save,
)

from dormouse.domain.agents import AgentId, AgentUpdate
from dormouse.domain.blocks import Link, Namespace, namespace_of, pack_tokens
from dormouse.domain.errors import (
    AgentNotFound,
    BlockMissing,
    DamagedBlock,
    EncryptionMismatch,
    SealBroken,
    SealedBlock,
    StoreError,
)
from dormouse.store.block_store import BlockStore
from dormouse.store.conversion import Conversion, destroy_tenant
from dormouse.store.files import open_block, read_header
from dormouse.store.identity import Identity
from dormouse.store.layout import VAULT_NAME
from dormouse.store.master_key import MasterKeyFile

OpenSealed = Callable[..., BlockStore]

WORD = "quetzalcoatlus"
TOKENS = [70_001 + 7 * number for number in range(2 * BLOCK_SIZE + 5)]
REST = [80_101, 80_202, 80_303]
REMEMBERED = [90_101, 90_202, 90_303]
IDENTITY = Identity("toy model", CACHE)
OTHER = IDENTITY.namespace("umbrella")


@pytest.fixture
def keys(tmp_path: Path) -> MasterKeyFile:
    return MasterKeyFile(tmp_path / "keys" / "master.key")


@pytest.fixture
def open_sealed(folder: Path, clock: Clock, keys: MasterKeyFile) -> Iterator[OpenSealed]:
    """Opens encrypted stores on one folder; each is checked and closed at the end of the test."""
    opened: list[BlockStore] = []

    def open_one(source: MasterKeyFile | None = keys, quota_nbytes: int = QUOTA) -> BlockStore:
        store = BlockStore.open(folder, quota_nbytes=quota_nbytes, clock=clock, key_source=source)
        store.register(NAMESPACE, CACHE, "toy model", tenant="acme")
        store.register(OTHER, CACHE, "toy model", tenant="umbrella")
        opened.append(store)
        return store

    yield open_one
    for store in opened:
        store.check()
        store.close()


def fill(store: BlockStore) -> list[Link]:
    """Something of every kind, with canaries in everything that has text or tokens."""
    links = reply(store, f"{WORD} agent", TOKENS, rest=REST)
    store.notebook.put("acme", "agent", f"{WORD} agent", f'{{"system": "{WORD}"}}'.encode())
    store.notebook.put("acme", "transcript", f"{WORD} agent", f'["{WORD}"]'.encode())
    store.notebook.put("acme", "response", f"{WORD} response", WORD.encode() * 100)
    store.admin.tag("acme", f"{WORD} agent", f"{WORD} tag")
    store.admin.fork("acme", f"{WORD} agent", f"{WORD} fork")
    store.notebook.remember(NAMESPACE, f"{WORD} key".encode(), REMEMBERED)
    assert store.flush()
    return links


def assert_filled(store: BlockStore, links: list[Link]) -> None:
    """All of what `fill` put is there."""
    assert_loads(store, links)
    for name in ("agent", "fork"):
        assert store.history(agent_id(f"{WORD} {name}")) == [*TOKENS, *REST]
    assert store.agent("acme", f"{WORD} fork").parent == f"{WORD} agent"
    assert store.agent("acme", f"{WORD} agent").durable_tokens == len(TOKENS)
    assert [tag.tag for tag in store.admin.tags("acme", f"{WORD} agent")] == [f"{WORD} tag"]
    assert store.notebook.get("acme", "transcript", f"{WORD} agent") == f'["{WORD}"]'.encode()
    assert store.notebook.get("acme", "response", f"{WORD} response") == WORD.encode() * 100
    assert [info.id for info in store.notebook.page("acme", "response")] == [f"{WORD} response"]
    assert [info.nbytes for info in store.notebook.page("acme", "response")] == [100 * len(WORD)]
    assert store.notebook.recall(NAMESPACE, f"{WORD} key".encode()) == tuple(REMEMBERED)
    assert store.identity(OTHER) == IDENTITY


def canaries(links: list[Link]) -> list[bytes]:
    """What must not lie on the disk: words, tokens as any whole number, keys, bytes of payloads."""
    found = [WORD.encode(), WORD.encode().hex().encode(), WORD.encode("utf-16-le"), b"toy model", b'"acme"']
    for tokens in (TOKENS[:3], TOKENS[-3:], REST, REMEMBERED):
        found.append(pack_tokens(tokens))
        found += [b"".join(t.to_bytes(8, "little") for t in tokens), json.dumps(tokens).encode()[1:-1]]
    for link in links:
        found += [link.key, link.key.hex().encode(), payload_of(link.key)[:64]]
    return found


def assert_unreadable(folder: Path, links: list[Link]) -> None:
    """No canary is in any file of the folder, nor in the name of one."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert any(path.name.endswith("-wal") for path in files) or len(files) > 3
    for path in files:
        data = path.read_bytes()
        for canary in canaries(links):
            assert canary not in data, f"{canary!r} is in {path.name}"
            assert canary not in str(path.relative_to(folder)).encode()


def sealed_files(folder: Path) -> list[Path]:
    return sorted((folder / "sealed-blocks").rglob("*.safetensors"))


def test_the_canaries_are_found_where_nothing_is_encrypted(folder: Path, open_sealed: OpenSealed) -> None:
    store = open_sealed(None)
    links = fill(store)
    data = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    names = "".join(str(path) for path in folder.rglob("*")).encode()
    missing = [canary for canary in canaries(links) if canary not in data + names]
    # Each in the one form in which a plain store has it.
    assert WORD.encode() in data
    assert {pack_tokens(REST), pack_tokens(REMEMBERED), pack_tokens(TOKENS[:3])}.isdisjoint(missing)
    assert not {payload_of(link.key)[:64] for link in links} & set(missing)


def test_nothing_readable_is_on_the_disk_and_all_of_it_comes_back(
    folder: Path, open_sealed: OpenSealed
) -> None:
    store = open_sealed()
    assert store.is_encrypted
    assert store.stats().encrypted
    links = fill(store)
    assert_unreadable(folder, links)  # with the log of the catalog as it is
    assert_filled(store, links)
    assert store.verify().is_clean
    assert store.stats().nbytes == nbytes_below(folder)
    store.close()
    assert_unreadable(folder, links)
    store = open_sealed()
    assert_filled(store, links)
    assert store.verify().is_clean
    assert store.stats().notes == ()
    assert store.stats().nbytes == nbytes_below(folder)


def test_files_are_for_their_owner_alone(folder: Path, open_sealed: OpenSealed, tmp_path: Path) -> None:
    fill(open_sealed())
    for path in [*folder.rglob("*"), tmp_path / "keys" / "master.key"]:
        assert not stat.S_IMODE(path.stat().st_mode) & 0o077, path


def test_a_sealed_file_is_a_safetensors_file_with_an_aligned_payload(
    folder: Path, open_sealed: OpenSealed
) -> None:
    fill(open_sealed())
    for path in sealed_files(folder):
        with safe_open(path, "numpy") as opened:
            assert opened.metadata()["format"] == "sealed-1"
            assert opened.get_tensor("payload").nbytes == CACHE.block_nbytes
        assert (8 + int.from_bytes(path.read_bytes()[:8], "little")) % 4096 == 0
        fd = open_block(path)
        with open(fd, "rb"), pytest.raises(SealedBlock, match="encrypted"):  # noqa: PTH123  # closes `fd`
            read_header(fd)


def test_the_same_block_is_never_sealed_alike(folder: Path, open_sealed: OpenSealed, clock: Clock) -> None:
    store = open_sealed()
    (link,) = links_of(TOKENS[:16])
    put_all(store, [link])
    assert store.flush()
    (path,) = sealed_files(folder)
    first = path.read_bytes()
    clock.advance(1)
    assert store.gc().num_blocks == 1
    put_all(store, [link])
    assert store.flush()
    second = path.read_bytes()
    assert first[:4096] == second[:4096], "it has the same name and header"
    common = sum(a == b for a, b in zip(first[4096:], second[4096:], strict=True))
    assert common < len(first) // 64


@pytest.mark.parametrize("position", [0, 30, 4000, 4096, 5000, -300, -170, -150, -120, -60, -1])
def test_a_flipped_bit_costs_time_and_no_text(folder: Path, open_sealed: OpenSealed, position: int) -> None:
    store = open_sealed()
    links = fill(store)
    store.close()
    victim = sealed_files(folder)[1]
    data = bytearray(victim.read_bytes())
    data[position] ^= 1
    victim.write_bytes(data)
    store = open_sealed()
    errors = [error for error, _ in (load(store, link.key) for link in links) if error is not None]
    assert [type(error) for error in errors] == [DamagedBlock]
    assert store.stats().counts["damaged"] == 1
    assert store.flush()
    assert len(list((folder / "quarantine").iterdir())) == 1
    put_all(store, links)
    assert store.flush()
    assert_filled(store, links)


def test_every_flipped_byte_is_found_by_verify(folder: Path, open_sealed: OpenSealed) -> None:
    store = open_sealed()
    links = fill(store)
    size = sealed_files(folder)[0].stat().st_size
    for position in [*range(0, 700, 53), *range(4090, size, 997), *range(size - 200, size, 17)]:
        victim = sealed_files(folder)[0]
        data = bytearray(victim.read_bytes())
        data[position] ^= 0x80
        victim.write_bytes(data)
        assert len(store.verify().damaged) == 1, position
        put_all(store, links)
        assert store.flush()
    assert_filled(store, links)


def test_swapped_files_are_damage(folder: Path, open_sealed: OpenSealed) -> None:
    store = open_sealed()
    links = fill(store)
    first, second, *_ = [path for path in sealed_files(folder) if path.stat().st_size > 0]
    sizes = {path.stat().st_size for path in (first, second)}
    a, b = first.read_bytes(), second.read_bytes()
    first.write_bytes(b)
    second.write_bytes(a)
    errors = [load(store, link.key)[0] for link in links]
    assert sum(isinstance(error, DamagedBlock) for error in errors) == 2, sizes
    assert store.history(agent_id(f"{WORD} agent")) == [*TOKENS, *REST]


def test_a_swapped_payload_under_the_right_header_and_tokens_is_damage(
    folder: Path, open_sealed: OpenSealed
) -> None:
    store = open_sealed()
    links = links_of(TOKENS[: 2 * BLOCK_SIZE])
    put_all(store, links)
    assert store.flush()
    a, b = sealed_files(folder)
    x, y = a.read_bytes(), b.read_bytes()
    assert len(x) == len(y)
    end = 4096 + CACHE.block_nbytes + 28
    a.write_bytes(x[:4096] + y[4096:end] + x[end:])
    errors = [load(store, link.key)[0] for link in links]
    assert sorted(type(error).__name__ for error in errors) == ["DamagedBlock", "NoneType"]


def test_rows_that_changed_places_do_not_open(folder: Path, open_sealed: OpenSealed) -> None:
    store = open_sealed()
    fill(store)
    store.close()
    with closing(sqlite3.connect(folder / "sealed-catalog.sqlite")) as catalog, catalog:
        ((rest,),) = catalog.execute("SELECT rest FROM checkpoints").fetchall()
        assert catalog.execute("UPDATE agents SET rest = ?", [rest]).rowcount == 2
        bodies = catalog.execute("SELECT body FROM documents ORDER BY length(body) DESC").fetchall()
        catalog.execute("UPDATE documents SET body = ?", bodies[0])
    store = open_sealed()
    assert store.agents() == []
    assert "do not open" in store.stats().notes[0]
    with pytest.raises(SealBroken):
        store.notebook.get("acme", "transcript", f"{WORD} agent")
    reply(store, "next", TOKENS)
    assert store.flush()


def test_a_row_of_an_unknown_key_is_damage(folder: Path, open_sealed: OpenSealed) -> None:
    store = open_sealed()
    links = fill(store)
    store.close()
    with closing(sqlite3.connect(folder / "sealed-catalog.sqlite")) as catalog, catalog:
        ((key, tokens),) = catalog.execute("SELECT key, tokens FROM blocks WHERE num_before = 16").fetchall()
        catalog.execute(
            "UPDATE blocks SET tokens = ? WHERE key = ?", [bytes([tokens[0] ^ 1]) + tokens[1:], key]
        )
    store = open_sealed()
    assert_filled(store, links)  # healed from its file
    assert len(store.stats().notes) == 1


def test_a_gone_catalog_is_rebuilt_from_the_files(folder: Path, open_sealed: OpenSealed) -> None:
    store = open_sealed()
    links = fill(store)
    store.close()
    (folder / "sealed-catalog.sqlite").unlink()
    store = open_sealed()
    assert_loads(store, links)
    assert store.agents() == []
    assert "histories of agents are lost" in store.stats().notes[0]
    assert store.verify().is_clean


def snapshot(folder: Path) -> dict[Path, bytes]:
    """Everything but the owner's pid."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != "store.lock"]
    return {path: path.read_bytes() for path in paths}


def test_without_its_key_or_with_another_a_store_is_left_alone(
    folder: Path, open_sealed: OpenSealed, tmp_path: Path
) -> None:
    store = open_sealed()
    links = fill(store)
    store.close()
    before = snapshot(folder)
    with pytest.raises(EncryptionMismatch, match="--encryption file"):
        open_sealed(None)
    missing = MasterKeyFile(tmp_path / "nowhere.key")
    with pytest.raises(EncryptionMismatch, match="has no key for it"):
        open_sealed(missing)
    assert not (tmp_path / "nowhere.key").exists(), "no key is made for a folder that has one"
    wrong = MasterKeyFile(tmp_path / "wrong.key")
    secret = wrong.create("any").hex()
    with pytest.raises(EncryptionMismatch, match="is not that of") as caught:
        open_sealed(wrong)
    told = "".join(traceback.format_exception(caught.value))
    assert secret not in told
    assert snapshot(folder) == before
    assert_filled(open_sealed(), links)


def test_a_store_that_lost_its_vault_is_left_alone(folder: Path, open_sealed: OpenSealed) -> None:
    store = open_sealed()
    links = fill(store)
    store.close()
    vault = (folder / VAULT_NAME).read_bytes()
    (folder / VAULT_NAME).unlink()
    before = snapshot(folder)
    for source in (None, MasterKeyFile(folder.parent / "other.key")):
        with pytest.raises(EncryptionMismatch, match=VAULT_NAME):
            open_sealed(source)
    assert snapshot(folder) == before
    (folder / VAULT_NAME).write_bytes(b"{")
    with pytest.raises(StoreError, match="cannot be read"):
        open_sealed()
    (folder / VAULT_NAME).write_bytes(vault)
    assert_filled(open_sealed(), links)


def test_an_older_vault_is_refused_rather_than_anybody_forgotten(
    folder: Path, open_sealed: OpenSealed
) -> None:
    store = open_sealed()
    fill(store)
    store.close()
    vault = (folder / VAULT_NAME).read_bytes()
    store = open_sealed()
    assert save(store, "ada", [], [1])
    store.notebook.put("umbrella", "agent", "eve", b"{}")
    assert store.flush()
    store.close()
    newest = (folder / VAULT_NAME).read_bytes()
    assert vault != newest
    (folder / VAULT_NAME).write_bytes(vault)
    with pytest.raises(EncryptionMismatch, match="newest copy"):
        open_sealed()
    (folder / VAULT_NAME).write_bytes(newest)
    assert open_sealed().notebook.get("umbrella", "agent", "eve") == b"{}"


def test_a_plain_store_is_not_encrypted_by_accident(
    folder: Path, open_sealed: OpenSealed, keys: MasterKeyFile
) -> None:
    store = open_sealed(None)
    links = fill(store)
    store.close()
    before = snapshot(folder)
    with pytest.raises(EncryptionMismatch, match="dormouse store encrypt"):
        open_sealed(keys)
    assert snapshot(folder) == before
    assert_filled(open_sealed(None), links)


def test_a_destroyed_key_takes_its_tenant_and_nobody_else(
    folder: Path, open_sealed: OpenSealed, keys: MasterKeyFile
) -> None:
    store = open_sealed()
    links = fill(store)
    theirs = links_of(TOKENS, OTHER)
    put_all(store, theirs, OTHER)
    store.save_agent(_update(AgentId("umbrella", "eve", OTHER), theirs))
    store.notebook.put("umbrella", "agent", "eve", b"{}")
    store.notebook.remember(OTHER, b"key", REMEMBERED)
    assert store.flush()
    store.close()
    copies = snapshot(folder)
    assert destroy_tenant(folder, keys, "acme")
    assert not destroy_tenant(folder, keys, "acme")
    assert not destroy_tenant(folder, keys, "")
    # Whoever has copies of all files but that of the keys has nothing of them any more.
    for path, data in copies.items():
        if path.name != VAULT_NAME:
            path.write_bytes(data)
    store = open_sealed()
    assert [agent.id.name for agent in store.agents()] == ["eve"]
    with pytest.raises(AgentNotFound):
        store.agent("acme", f"{WORD} agent")
    assert all(isinstance(load(store, link.key)[0], BlockMissing) for link in links)
    assert store.notebook.get("acme", "transcript", f"{WORD} agent") is None
    assert store.notebook.recall(NAMESPACE, f"{WORD} key".encode()) is None
    assert_loads(store, theirs)
    assert store.history(AgentId("umbrella", "eve", OTHER)) == TOKENS
    assert store.notebook.recall(OTHER, b"key") == tuple(REMEMBERED)
    assert store.health() == ()
    assert store.stats().notes == ()
    assert store.verify().is_clean
    assert len(sealed_files(folder)) == len(theirs)
    assert not list((folder / "quarantine").iterdir())
    assert_filled_again(store)


def assert_filled_again(store: BlockStore) -> None:
    """A forgotten tenant may come back, and is a new one."""
    links = fill(store)
    assert_filled(store, links)


def _update(id: AgentId, links: list[Link]) -> AgentUpdate:
    return AgentUpdate(id, "toy", tuple(links), ())


def test_only_an_encrypted_folder_has_keys_to_destroy(
    folder: Path, open_sealed: OpenSealed, keys: MasterKeyFile
) -> None:
    open_sealed(None).close()
    with pytest.raises(EncryptionMismatch, match="not encrypted"):
        destroy_tenant(folder, keys, "acme")


def test_deleting_an_agent_leaves_nothing_of_it(folder: Path, open_sealed: OpenSealed) -> None:
    store = open_sealed()
    fill(store)
    for name in ("agent", "fork"):
        store.delete_agent("acme", f"{WORD} {name}")
    assert sealed_files(folder) == []
    store.close()
    with closing(sqlite3.connect(folder / "sealed-catalog.sqlite")) as catalog:
        counts = [
            catalog.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
            for table in ("agents", "checkpoints", "blocks")
        ]
    assert counts == [0, 0, 0]


def test_the_quota_holds(folder: Path, open_sealed: OpenSealed, clock: Clock) -> None:
    store = open_sealed(quota_nbytes=2 << 20)
    number = 0
    while not store.stats().counts["evictions"]:
        clock.advance(1)
        put_all(store, links_of(range(number, number + 4 * BLOCK_SIZE)))
        store.flush()
        number += 1000
        assert nbytes_below(folder) <= 2 << 20
    assert store.stats().nbytes == nbytes_below(folder)


def test_a_namespace_without_a_tenant_is_refused(open_sealed: OpenSealed) -> None:
    store = open_sealed()
    unknown = namespace_of("unknown")
    store.register(unknown, CACHE)
    (link,) = links_of(range(16), unknown)
    with pytest.raises(ValueError, match="without its tenant"):
        store.put(unknown, link, payload_of(link.key))
    with pytest.raises(ValueError, match="without its tenant"):
        store.notebook.remember(unknown, b"key", [1])


@pytest.mark.parametrize(("sealed_source", "sealed_target"), [(True, False), (False, True), (True, True)])
def test_an_agent_moves_between_stores_whether_they_are_encrypted_or_not(
    open_sealed: OpenSealed, keys: MasterKeyFile, sealed_source: bool, sealed_target: bool
) -> None:
    store = open_sealed(keys if sealed_source else None)
    fill(store)
    body = b"".join(store.admin.export("acme", f"{WORD} agent"))
    with ram_folder() as place:
        other_keys = MasterKeyFile(place / "other.key") if sealed_target else None
        with BlockStore.open(place / "other", quota_nbytes=QUOTA, key_source=other_keys) as other:
            with other.scratch() as file:
                for start in range(0, len(body), 1000):
                    file.write(body[start : start + 1000])
                here = other.admin.load(file, len(body), "home", expected=IDENTITY).id
            assert other.history(here) == [*TOKENS, *REST]
            for old, new in zip(links_of(TOKENS), links_of(TOKENS, here.namespace), strict=True):
                assert load(other, new.key) == (None, payload_of(old.key))
            assert other.notebook.get("home", "transcript", f"{WORD} agent") == f'["{WORD}"]'.encode()
            assert other.verify().is_clean
            if sealed_target:
                assert_unreadable(place / "other", [])


def test_what_is_uploaded_waits_encrypted(open_sealed: OpenSealed) -> None:
    body = bytes(range(256)) * 5000
    with open_sealed().scratch() as file:
        file.write(body)
        file.flush()
        raw = file.raw._file  # type: ignore[attr-defined]  # what is on the disk
        raw.seek(0)
        assert body[:64] not in raw.read()
        for place in (0, 1, 15, 16, 17, 70_003):
            file.seek(place)
            assert file.read(100) == body[place : place + 100]
        file.seek(0)
        assert file.read() == body


def test_turning_it_on_and_off_again(folder: Path, open_sealed: OpenSealed, keys: MasterKeyFile) -> None:
    store = open_sealed(None)
    links = fill(store)
    eve = links_of(TOKENS, OTHER)
    put_all(store, eve, OTHER)  # of nobody: found again by the tenants that are known
    history = links_of([3] * 40)
    assert save(store, "history alone", history)
    store.close()
    done = Conversion(folder, keys, quota_nbytes=QUOTA).encrypt()
    assert (done.num_agents, done.num_blocks) == (3, len(links))
    assert done.num_lost == len(eve), "nobody is known whose these are"
    assert not (folder / "catalog.sqlite").exists()
    assert not (folder / "blocks").exists()
    assert_unreadable(folder, links)
    store = open_sealed()
    assert_filled(store, links)
    assert store.history(agent_id("history alone")) == [3] * 40
    assert store.stats().nbytes == nbytes_below(folder)
    store.close()
    done = Conversion(folder, keys, quota_nbytes=QUOTA).decrypt()
    assert (done.num_agents, done.num_blocks, done.num_lost) == (3, len(links), 0)
    assert {path.name for path in folder.iterdir()} == {
        "blocks",
        "catalog.sqlite",
        "quarantine",
        "store.lock",
    }
    store = open_sealed(None)
    assert_filled(store, links)
    assert store.verify().is_clean
    assert store.stats().nbytes == nbytes_below(folder)


def test_what_cannot_be_trusted_is_not_left_behind_in_clear(
    folder: Path, open_sealed: OpenSealed, keys: MasterKeyFile
) -> None:
    store = open_sealed(None)
    links = fill(store)
    store.close()
    foreign = folder / "blocks" / "notes.txt"
    foreign.write_text(WORD)
    for _ in range(2):
        with pytest.raises(StoreError, match="could not be trusted"):
            Conversion(folder, keys, quota_nbytes=QUOTA).encrypt()
    for path in (folder / "quarantine").iterdir():
        path.unlink()
    Conversion(folder, keys, quota_nbytes=QUOTA).encrypt()
    assert_unreadable(folder, links)
    assert_filled(open_sealed(), links)


def test_keys_that_a_crash_left_go(folder: Path, open_sealed: OpenSealed, keys: MasterKeyFile) -> None:
    open_sealed().close()
    old = folder / "vault.old"
    old.write_bytes((folder / VAULT_NAME).read_bytes())
    open_sealed().close()
    assert not old.exists()

    def cut(step: str, _: object) -> None:
        if step == "wipe" and not (folder / VAULT_NAME).exists():
            raise OSError(5, "cut")

    ops = FaultyOps(cut)
    with pytest.raises(StoreError, match="run it again"):
        Conversion(folder, keys, quota_nbytes=QUOTA, file_ops=ops).decrypt()
    assert old.exists()
    open_sealed(None).close()
    assert not old.exists()


class CutOps(UnsyncedOps):
    """Fails at the step of that number."""

    def __init__(self, fail_at: int) -> None:
        self._left = fail_at

    def _step(self) -> None:
        if self._left == 0:
            raise OSError(5, "cut")
        self._left -= 1

    def fsync_folder(self, folder: Path) -> None:
        del folder
        self._step()

    def rename(self, source: Path, target: Path) -> None:
        self._step()
        super().rename(source, target)

    def unlink(self, path: Path) -> None:
        self._step()
        super().unlink(path)


def test_a_conversion_that_is_cut_anywhere_goes_on(
    folder: Path, open_sealed: OpenSealed, keys: MasterKeyFile
) -> None:
    store = open_sealed(None)
    links = fill(store)
    store.close()
    for way in ("encrypt", "decrypt"):
        step = 0
        while True:
            conversion = Conversion(folder, keys, quota_nbytes=QUOTA, file_ops=CutOps(step))
            try:
                getattr(conversion, way)()
                break
            except StoreError:
                step += 1
            if (folder / VAULT_NAME).exists():
                state = json.loads((folder / VAULT_NAME).read_bytes())["state"]
                if state != "on":
                    with pytest.raises(EncryptionMismatch, match="was cut"):
                        open_sealed(keys)
        assert step > 10
        store = open_sealed(keys if way == "encrypt" else None)
        assert_filled(store, links)
        store.close()
    with pytest.raises(EncryptionMismatch, match="not encrypted"):
        Conversion(folder, keys, quota_nbytes=QUOTA).decrypt()


def test_no_key_is_in_logs_or_reprs(
    open_sealed: OpenSealed, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    caplog.set_level(logging.DEBUG)
    store = open_sealed()
    fill(store)
    secret = (tmp_path / "keys" / "master.key").read_text().strip()
    assert "keep a copy" in caplog.text
    parts = store._parts
    shown = f"{caplog.text} {parts!r} {store!r} {parts.vault!r} {vars(parts.vault)!r}"
    assert secret not in shown
    assert bytes.fromhex(secret).hex() not in shown


Mangle = Callable[[Path], None]


def _open_to_all(path: Path) -> None:
    path.chmod(0o644)


def _cut(path: Path) -> None:
    path.write_text("abcd\n")


def _noise(path: Path) -> None:
    path.write_bytes(b"\xff" * 64)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("mangle", "says"),
    [(_open_to_all, "chmod 600"), (_cut, "is no key"), (_noise, "is no key"), (_folder, "cannot be read")],
)
def test_a_key_file_that_is_none_is_refused(
    folder: Path, open_sealed: OpenSealed, tmp_path: Path, mangle: Mangle, says: str
) -> None:
    open_sealed().close()
    before = snapshot(folder)
    mangle(tmp_path / "keys" / "master.key")
    with pytest.raises(StoreError, match=says):
        open_sealed()
    assert snapshot(folder) == before


def test_plain_stores_know_nothing_of_it(folder: Path, open_sealed: OpenSealed) -> None:
    store = open_sealed(None)
    fill(store)
    store.close()
    assert {path.name for path in folder.iterdir()} == {
        "blocks",
        "catalog.sqlite",
        "quarantine",
        "store.lock",
    }


def test_agents_of_two_tenants_may_have_one_name(open_sealed: OpenSealed) -> None:
    store = open_sealed()
    for tenant, namespace in (("acme", NAMESPACE), ("umbrella", OTHER)):
        links = links_of(TOKENS, namespace)
        put_all(store, links, namespace)
        store.save_agent(_update(AgentId(tenant, "ada", namespace), links))
    assert store.flush()
    store.close()
    store = open_sealed()
    for tenant, namespace in (("acme", NAMESPACE), ("umbrella", OTHER)):
        assert store.history(AgentId(tenant, "ada", namespace)) == TOKENS


def test_an_agent_comes_back_from_its_own_file(open_sealed: OpenSealed) -> None:
    store = open_sealed()
    fill(store)
    body = b"".join(store.admin.export("acme", f"{WORD} agent"))
    store.delete_agent("acme", f"{WORD} agent")
    store.admin.load(io.BytesIO(body), len(body), "acme", expected=None)
    assert store.history(agent_id(f"{WORD} agent", Namespace(IDENTITY.namespace("acme")))) == [*TOKENS, *REST]
