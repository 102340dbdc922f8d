from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.store.kit import CACHE, NAMESPACE, QUOTA, Clock, OpenStore, ram_folder

from dormouse.store.block_store import BlockStore
from dormouse.store.file_ops import FileOps
from dormouse.store.options import StoreOptions


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def folder() -> Iterator[Path]:
    with ram_folder() as place:
        yield place / "data"


@pytest.fixture
def open_store(folder: Path, clock: Clock) -> Iterator[OpenStore]:
    """Opens stores on one folder; each is checked and closed at the end of the test."""
    opened: list[BlockStore] = []

    def open_one(
        *,
        quota_nbytes: int = QUOTA,
        options: StoreOptions | None = None,
        file_ops: FileOps | None = None,
    ) -> BlockStore:
        store = BlockStore.open(
            folder, quota_nbytes=quota_nbytes, options=options, file_ops=file_ops, clock=clock
        )
        store.register(NAMESPACE, CACHE)
        opened.append(store)
        return store

    yield open_one
    for store in opened:
        store.check()
        store.close()


@pytest.fixture
def store(open_store: OpenStore) -> BlockStore:
    return open_store()
