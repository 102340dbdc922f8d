"""The master key in the system's keyring, with a keyring of our own in its place."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import keyring
import pytest
from keyring.backend import KeyringBackend
from keyring.errors import KeyringLocked
from tests.store.kit import QUOTA

from dormouse.domain.errors import EncryptionMismatch, StoreError
from dormouse.store.block_store import BlockStore
from dormouse.store.master_key import KEYRING_SERVICE, MasterKeyring


class Ring(KeyringBackend):
    """A keyring in memory, which may be locked."""

    priority = 1

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.passwords: dict[tuple[str, str], str] = {}
        self.is_locked = False

    def get_password(self, service: str, username: str) -> str | None:
        if self.is_locked:
            raise KeyringLocked("locked")
        return self.passwords.get((service, username))

    def set_password(self, service: str, username: str, password: str) -> None:
        if self.is_locked:
            raise KeyringLocked("locked")
        self.passwords[service, username] = password


@pytest.fixture
def ring() -> Iterator[Ring]:
    before, ring = keyring.get_keyring(), Ring()
    keyring.set_keyring(ring)
    yield ring
    keyring.set_keyring(before)


def open_store(folder: Path) -> BlockStore:
    return BlockStore.open(folder, quota_nbytes=QUOTA, key_source=MasterKeyring())


def test_each_folder_has_its_key_there(ring: Ring, tmp_path: Path) -> None:
    for name in ("a", "b"):
        with open_store(tmp_path / name) as store:
            store.notebook.put("acme", "agent", "ada", name.encode())
    assert {service for service, _ in ring.passwords} == {KEYRING_SERVICE}
    assert len(set(ring.passwords.values())) == 2
    with open_store(tmp_path / "a") as store:
        assert store.notebook.get("acme", "agent", "ada") == b"a"
    # Another folder's keys open nothing here.
    (tmp_path / "a" / "vault.json").write_bytes((tmp_path / "b" / "vault.json").read_bytes())
    with open_store(tmp_path / "a") as store:
        assert store.notebook.get("acme", "agent", "ada") is None


def test_a_keyring_that_is_locked_or_empty_says_so(ring: Ring, tmp_path: Path) -> None:
    ring.is_locked = True
    with pytest.raises(StoreError, match="does not open"):
        open_store(tmp_path / "a")
    ring.is_locked = False
    open_store(tmp_path / "a").close()
    ring.passwords.clear()
    with pytest.raises(EncryptionMismatch, match="keyring"):
        open_store(tmp_path / "a")
    assert not ring.passwords
