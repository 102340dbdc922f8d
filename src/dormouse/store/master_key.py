"""Where the master key lies: a file that only its owner may read, or the keyring of the system.

Whoever has this key and the data folder has everything in it; whoever has the folder alone has nothing.
"""

from __future__ import annotations

import logging
import os
import secrets
import stat
from pathlib import Path
from typing import Any, Protocol

from dormouse.domain.errors import EncryptionMismatch, StoreError

log = logging.getLogger(__name__)

MASTER_KEY_NBYTES = 32
KEYRING_SERVICE = "dormouse"
_GROUP_AND_OTHERS = 0o077
_MAX_FILE_NBYTES = 1 << 10


class KeySource(Protocol):
    """A place of master keys. `store_id` says of which data folder; both methods raise StoreError."""

    @property
    def place(self) -> str:
        """Where that is, for people."""

    def find(self, store_id: str) -> bytearray | None:
        """The key, None when there is none."""

    def create(self, store_id: str) -> bytearray:
        """A new key, kept there on return."""


class MasterKeyFile:
    """64 hexadecimal digits in a file of mode 0600. One file may serve several data folders."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @property
    def place(self) -> str:
        """The file."""
        return f"the key file {self._path}"

    def find(self, store_id: str) -> bytearray | None:
        """See `KeySource`. Refuses a file that others may read: a key that was open once is none."""
        del store_id
        try:
            with self._path.open("rb", buffering=0) as file:
                found = os.fstat(file.fileno())
                text = bytearray(_MAX_FILE_NBYTES)
                nbytes = file.readinto(text) if stat.S_ISREG(found.st_mode) else 0
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StoreError(f"{self.place} cannot be read: {error}") from error
        if found.st_mode & _GROUP_AND_OTHERS:
            _wipe(text)
            raise StoreError(
                f"{self.place} can be read by others (mode {stat.S_IMODE(found.st_mode):o}); "
                f"run `chmod 600 {self._path}`"
            )
        return _decode(text, nbytes or 0, self.place)

    def create(self, store_id: str) -> bytearray:
        """See `KeySource`. A file that is there already is not replaced."""
        del store_id
        key = bytearray(secrets.token_bytes(MASTER_KEY_NBYTES))
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(fd, "wb") as file:
                file.write(f"{key.hex()}\n".encode())
                file.flush()
                os.fsync(file.fileno())
            folder = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:
            raise StoreError(f"{self.place} cannot be made: {error}") from error
        return key


class MasterKeyring:
    """The keyring of the system's session, through the package `keyring`: a key per data folder."""

    @property
    def place(self) -> str:
        """The keyring."""
        return f"the system's keyring (service {KEYRING_SERVICE!r})"

    def find(self, store_id: str) -> bytearray | None:
        """See `KeySource`."""
        keyring, errors = _import_keyring()
        try:
            text = keyring.get_password(KEYRING_SERVICE, store_id)
        except errors.KeyringError as error:
            raise StoreError(f"{self.place} does not open: {error}; unlock it, or use a key file") from error
        if text is None:
            return None
        raw = bytearray(text.encode())
        return _decode(raw, len(raw), self.place)

    def create(self, store_id: str) -> bytearray:
        """See `KeySource`."""
        keyring, errors = _import_keyring()
        key = bytearray(secrets.token_bytes(MASTER_KEY_NBYTES))
        try:
            keyring.set_password(KEYRING_SERVICE, store_id, key.hex())
        except errors.KeyringError as error:
            raise StoreError(f"{self.place} keeps no key: {error}; use a key file") from error
        return key


def require_key(source: KeySource, store_id: str) -> bytearray:
    """The key of a folder that is encrypted. Raises EncryptionMismatch when there is none."""
    key = source.find(store_id)
    if key is None:
        raise EncryptionMismatch(
            f"the data folder is encrypted and {source.place} has no key for it (store {store_id}); "
            "bring the key back from its copy, or choose another data folder. Nothing was changed"
        )
    return key


def find_or_create_key(source: KeySource, store_id: str) -> bytearray:
    """The key for a folder that is going to be encrypted; people are told of a new one."""
    key = source.find(store_id)
    if key is None:
        key = source.create(store_id)
        log.warning(
            "made a master key in %s: keep a copy of it elsewhere; without it nothing in the data folder "
            "can ever be read again",
            source.place,
        )
    return key


def _import_keyring() -> tuple[Any, Any]:
    try:
        import keyring
        import keyring.errors
    except ImportError as error:
        raise StoreError(
            "the package keyring is not installed; `pip install 'dormouse[keyring]'`, or use a key file"
        ) from error
    return keyring, keyring.errors


def _decode(text: bytearray, nbytes: int, place: str) -> bytearray:
    """The key that `text` spells; `text` is overwritten. Raises StoreError."""
    try:
        key = bytearray.fromhex(text[:nbytes].decode("ascii").strip())
    except ValueError:
        key = bytearray()
    _wipe(text)
    if len(key) != MASTER_KEY_NBYTES:
        raise StoreError(f"what is in {place} is no key: {2 * MASTER_KEY_NBYTES} hexadecimal digits are one")
    return key


def _wipe(secret: bytearray) -> None:
    secret[:] = bytes(len(secret))
