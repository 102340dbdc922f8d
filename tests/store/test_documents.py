"""Documents and remembered replies: bounded, readable at once, there after a restart."""

from __future__ import annotations

import sqlite3
import threading
from pathlib import Path

import pytest
from tests.store.kit import (
    NAMESPACE,
    QUOTA,
    WAIT_S,
    Clock,
    FailingOps,
    GatedOps,
    OpenStore,
    nbytes_below,
    reply,
)

from dormouse.domain.blocks import namespace_of
from dormouse.domain.errors import DocumentsFull
from dormouse.store.block_store import BlockStore
from dormouse.store.options import StoreOptions


def ids(store: BlockStore, kind: str = "response", tenant: str = "acme") -> list[str]:
    return [info.id for info in store.notebook.page(tenant, kind)]


def test_a_document_is_there_at_once_and_after_a_restart(open_store: OpenStore) -> None:
    ops = GatedOps("commit")
    store = open_store(file_ops=ops)
    store.flush()
    ops.gate.clear()
    store.notebook.put("acme", "response", "r/1", b"one")
    store.notebook.put("acme", "response", "r/1", b"two")
    assert store.notebook.get("acme", "response", "r/1") == b"two"
    assert store.notebook.get("other", "response", "r/1") is None
    ops.gate.set()
    assert store.flush()
    store.close()
    store = open_store()
    assert store.notebook.get("acme", "response", "r/1") == b"two"
    assert store.notebook.delete("acme", "response", "r/1")
    assert not store.notebook.delete("acme", "response", "r/1")
    assert store.notebook.get("acme", "response", "r/1") is None
    store.close()
    assert ids(open_store()) == []


def test_a_document_that_was_put_again_keeps_its_birth(open_store: OpenStore, clock: Clock) -> None:
    store = open_store()
    born = clock.now
    store.notebook.put("acme", "response", "a", b"1")
    store.flush()
    clock.advance(5)
    store.notebook.put("acme", "response", "a", b"22")
    store.flush()
    store.close()
    assert open_store().notebook.page("acme", "response") == [("a", born, born + 5, 2)]


def test_documents_are_listed_in_pages(store: BlockStore) -> None:
    for name in "cabd":
        store.notebook.put("acme", "response", name, b"")
    assert [d.id for d in store.notebook.page("acme", "response", limit=2)] == ["a", "b"]
    store.notebook.delete("acme", "response", "b")
    assert [d.id for d in store.notebook.page("acme", "response", limit=9, after="b")] == ["c", "d"]


def test_the_longest_unused_documents_go_first(open_store: OpenStore, clock: Clock) -> None:
    options = StoreOptions(max_documents=3, max_documents_nbytes=100)
    store = open_store(options=options)
    for name in "abc":
        store.notebook.put("acme", "response", name, b"x" * 30)
        clock.advance(1)
    store.flush()
    assert store.notebook.get("acme", "response", "a")
    store.notebook.put("acme", "response", "d", b"x")
    assert ids(store) == ["a", "c", "d"], "by count"
    store.notebook.put("acme", "response", "c", b"x" * 99)
    assert ids(store) == ["c", "d"], "by bytes"
    with pytest.raises(DocumentsFull):
        store.notebook.put("acme", "response", "e", b"x" * 101)
    store.notebook.put("acme", "other", "e", b"x" * 100)
    store.close()
    store = open_store(options=options)
    assert ids(store) == ["c", "d"]
    assert ids(store, "other") == ["e"]


def test_what_is_kept_for_good_is_refused_above_the_bound(open_store: OpenStore) -> None:
    store = open_store(options=StoreOptions(max_documents=2, max_documents_nbytes=10))
    store.notebook.put("acme", "agent", "a", b"12345")
    store.notebook.put("acme", "agent", "b", b"12345")
    for name, body in (("c", b""), ("b", b"123456")):
        with pytest.raises(DocumentsFull, match="bound of 2"):
            store.notebook.put("acme", "agent", name, body)
    assert store.notebook.get("acme", "agent", "b") == b"12345"
    store.notebook.put("other", "agent", "a", b"12345")


def test_tenants_together_keep_a_quarter_of_the_quota(open_store: OpenStore) -> None:
    store = open_store(quota_nbytes=8 << 20)
    for number in range(4):
        store.notebook.put(f"t{number}", "agent", "a", bytes(500 << 10))
    store.notebook.put("t4", "response", "r", bytes(500 << 10))
    with pytest.raises(DocumentsFull, match="all tenants"):
        store.notebook.put("t4", "agent", "a", bytes(500 << 10))
    store.notebook.put("t0", "agent", "a", bytes(400 << 10))
    store.notebook.delete("t1", "agent", "a")
    store.notebook.put("t4", "agent", "a", bytes(500 << 10))


def test_uses_are_recorded(open_store: OpenStore, clock: Clock) -> None:
    store = open_store()
    store.notebook.put("acme", "response", "a", b"1")
    store.flush()
    clock.advance(60)
    store.notebook.get("acme", "response", "a")
    store.close()
    (info,) = open_store().notebook.page("acme", "response")
    assert info.used_at == info.created_at + 60


def test_a_failing_disk_loses_no_note(open_store: OpenStore) -> None:
    ops = FailingOps()
    store = open_store(file_ops=ops, options=StoreOptions(retry_s=0.01))
    store.notebook.put("acme", "response", "gone", b"old")
    assert store.flush()
    ops.errors["commit"] = sqlite3.OperationalError("disk I/O error")
    store.notebook.put("acme", "response", "a", b"1")
    store.notebook.delete("acme", "response", "gone")
    store.notebook.remember(NAMESPACE, b"k", [1, 2])
    assert not store.flush()
    assert store.notebook.get("acme", "response", "a") == b"1"
    assert store.notebook.recall(NAMESPACE, b"k") == (1, 2)
    ops.errors.clear()
    assert store.flush()
    store.close()
    store = open_store()
    assert ids(store) == ["a"]
    assert store.notebook.recall(NAMESPACE, b"k") == (1, 2)


def test_what_went_before_it_was_written_is_forgotten(open_store: OpenStore) -> None:
    ops = FailingOps()
    options = StoreOptions(retry_s=0.01, max_documents=3, max_replies=3)
    store = open_store(file_ops=ops, options=options)
    store.notebook.put("acme", "response", "stored", b"old")
    store.notebook.remember(NAMESPACE, b"stored", [1])
    assert store.flush()
    ops.errors["commit"] = sqlite3.OperationalError("disk I/O error")
    for number in range(50):
        store.notebook.put("acme", "response", str(number), b"1")
        store.notebook.remember(NAMESPACE, str(number).encode(), [1])
        assert not store.flush()
    documents, _ = store._parts.notes.documents.unsaved()
    assert len(documents) == 4, "those that are kept, and the one to be deleted"
    assert len(store._parts.notes.replies.unsaved()) == 4
    ops.errors.clear()
    assert store.flush()
    store.close()
    store = open_store(options=options)
    assert ids(store) == ["47", "48", "49"]
    assert store.notebook.recall(NAMESPACE, b"stored") is None
    assert store.notebook.recall(NAMESPACE, b"47") == (1,)


def test_what_goes_while_it_is_written_stays_gone(open_store: OpenStore) -> None:
    ops = GatedOps("commit")
    options = StoreOptions(max_replies=1)
    store = open_store(file_ops=ops, options=options)
    assert store.flush()
    ops.gate.clear()
    store.notebook.put("acme", "response", "a", b"1")
    store.notebook.remember(NAMESPACE, b"a", [1])
    assert ops.reached.wait(WAIT_S)
    store.notebook.delete("acme", "response", "a")
    store.notebook.remember(NAMESPACE, b"b", [1])
    ops.gate.set()
    assert store.flush()
    store.close()
    store = open_store(options=StoreOptions(max_replies=10))
    assert ids(store) == []
    assert store.notebook.recall(NAMESPACE, b"a") is None
    assert store.notebook.recall(NAMESPACE, b"b") == (1,)


def test_a_put_while_the_deletion_is_written_wins(open_store: OpenStore) -> None:
    ops = GatedOps("commit")
    store = open_store(file_ops=ops)
    store.notebook.put("acme", "response", "a", b"1")
    store.flush()
    ops.gate.clear()
    store.notebook.delete("acme", "response", "a")
    assert ops.reached.wait(WAIT_S)
    store.notebook.put("acme", "response", "a", b"2")
    ops.gate.set()
    store.flush()
    assert store.notebook.get("acme", "response", "a") == b"2"
    store.close()
    assert open_store().notebook.get("acme", "response", "a") == b"2"


def test_documents_count_against_the_quota(open_store: OpenStore, folder: Path) -> None:
    quota = 2 << 20
    store = open_store(quota_nbytes=quota)
    before = store.stats().catalog_nbytes
    for number in range(60):
        store.notebook.put("acme", "response", str(number), bytes([number]) * 20_000)
        store.flush()
        assert nbytes_below(folder) <= quota
    assert store.stats().catalog_nbytes - before >= 200_000
    assert 5 < len(ids(store)) < 20, "an eighth of the quota"


def test_a_reply_is_recalled_while_the_disk_is_busy_and_after_a_restart(open_store: OpenStore) -> None:
    ops = GatedOps("commit")
    store = open_store(file_ops=ops)
    ops.gate.clear()
    store.notebook.put("acme", "response", "a", b"1")
    assert ops.reached.wait(WAIT_S)
    done = threading.Event()

    def remember() -> None:
        store.notebook.remember(NAMESPACE, b"key", [1, 2, 70000])
        assert store.notebook.recall(NAMESPACE, b"key") == (1, 2, 70000)
        assert store.notebook.recall(namespace_of("other"), b"key") is None
        done.set()

    threading.Thread(target=remember).start()
    waited = done.wait(WAIT_S)
    ops.gate.set()
    assert waited
    store.close()
    assert open_store().notebook.recall(NAMESPACE, b"key") == (1, 2, 70000)


def test_replies_are_bounded_by_count_bytes_and_age(open_store: OpenStore, clock: Clock) -> None:
    options = StoreOptions(max_replies=3, max_replies_nbytes=3000, replies_age_s=100)
    store = open_store(options=options)
    for name in (b"a", b"b", b"c"):
        store.notebook.remember(NAMESPACE, name, [1])
        clock.advance(1)
    assert store.notebook.recall(NAMESPACE, b"a") == (1,)
    store.notebook.remember(NAMESPACE, b"d", [1])
    assert store.notebook.recall(NAMESPACE, b"b") is None, "the least recently used"
    store.notebook.remember(NAMESPACE, b"e", [1] * 500)
    assert store.notebook.recall(NAMESPACE, b"c") is None
    store.notebook.remember(NAMESPACE, b"f", [1] * 1000)
    assert store.notebook.recall(NAMESPACE, b"f") is None, "larger than all of the bound"
    assert store.notebook.recall(NAMESPACE, b"e") is not None
    store.flush()
    clock.advance(60)
    assert store.notebook.recall(NAMESPACE, b"a") == (1,)
    store.close()
    clock.advance(60)
    store = open_store(options=options)
    assert store.notebook.recall(NAMESPACE, b"e") is None, "unused for too long"
    assert store.notebook.recall(NAMESPACE, b"a") == (1,), "its use was recorded"


def test_notes_leave_blocks_alone(open_store: OpenStore) -> None:
    store = open_store(quota_nbytes=QUOTA)
    links = reply(store, "ada", list(range(40)))
    store.notebook.put("acme", "response", "a", b"1")
    store.flush()
    assert all(store.has_durable(link.key) for link in links)
