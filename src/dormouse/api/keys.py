"""API keys: who may call, for which tenant. They live in one file of the data folder.

The file holds digests, never keys. A key is 256 random bits, so a plain SHA-256 of it is enough: slow or
salted hashes protect what people choose and others can guess, and nobody guesses 256 bits.

`dormouse keys` writes the file, the server only reads it, when its time changes. When each key was last used
is written by the server alone, into a file of its own: so each file has one writer.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import json
import logging
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dormouse.domain.agents import DEFAULT_TENANT
from dormouse.domain.errors import InvalidRequest, KeyNotFound, StoreError
from dormouse.store.file_ops import FileOps
from dormouse.store.opening import make_private

log = logging.getLogger(__name__)

KEY_PREFIX = "dm"
_KEY = re.compile(rf"{KEY_PREFIX}-([0-9a-f]{{8}})-[\w-]{{43}}", re.ASCII)
_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_MAX_NAME_LENGTH = 128
_FORMAT = 1
_USED_EVERY_S = 60.0
"""A key's last use is known to the minute: a write a request would be one too many."""


@dataclass(frozen=True, slots=True)
class Key:
    """A key as the file knows it. `digest` is the SHA-256 of the key, in hex; times are Unix seconds."""

    id: str
    digest: str
    tenant: str
    is_admin: bool
    name: str | None
    created_at: float
    revoked_at: float | None = None
    used_at: float | None = None


class KeyFile:
    """The keys of a data folder, for the commands that change them."""

    def __init__(self, data_dir: Path) -> None:
        self.path = data_dir / "keys.json"
        self._used = data_dir / "keys-used.json"

    def all(self) -> list[Key]:
        """All keys, revoked ones too, oldest first. Raises StoreError when the file is damaged."""
        used = _read_used(self._used)
        return [replace(key, used_at=used.get(key.id)) for key in _read_keys(self.path)]

    def add(self, tenant: str = DEFAULT_TENANT, *, is_admin: bool = False, name: str | None = None) -> str:
        """Make a key and return it: the only time that anybody sees it. Raises InvalidRequest, StoreError."""
        if not _TENANT.fullmatch(tenant):
            raise InvalidRequest(f"'{tenant}' is no tenant; use 1 to 64 letters, digits, dots, - and _")
        if name is not None and not (0 < len(name) <= _MAX_NAME_LENGTH and name.isprintable()):
            raise InvalidRequest(f"a key's name has 1 to {_MAX_NAME_LENGTH} characters, none of them control")
        key_id = secrets.token_hex(4)
        key = f"{KEY_PREFIX}-{key_id}-{secrets.token_urlsafe(32)}"
        with self._changing() as keys:
            keys.append(Key(key_id, _digest(key), tenant, is_admin, name, time.time()))
        return key

    def revoke(self, id: str) -> Key:
        """The key is valid no more, from the next request on. Raises KeyNotFound, StoreError."""
        with self._changing() as keys:
            for index, key in enumerate(keys):
                if key.id == id and key.revoked_at is None:
                    keys[index] = replace(key, revoked_at=time.time())
                    return keys[index]
        raise KeyNotFound(f"no valid key has the id '{id}'; `dormouse keys list` shows them")

    @contextmanager
    def _changing(self) -> Iterator[list[Key]]:
        """The keys, to be changed and written back; one process at a time."""
        make_private(self.path.parent, FileOps())
        lock = os.open(self.path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            keys = _read_keys(self.path)
            before = list(keys)
            yield keys
            if keys != before:
                rows = [{name: v for name, v in asdict(key).items() if name != "used_at"} for key in keys]
                _replace(self.path, {"format": _FORMAT, "keys": rows})
        finally:
            os.close(lock)


class KeyRing:
    """The keys as a running server uses them. For the event loop's thread.

    Without a single key, revoked ones included, the server is open. From the first key on it is closed, and
    stays so whatever becomes of the file: a deleted or damaged one admits those who were admitted before.
    """

    def __init__(self, data_dir: Path, clock: Callable[[], float] = time.time) -> None:
        """Raises StoreError when the file is damaged: a server must not start open by accident."""
        self._path = data_dir / "keys.json"
        self._used_path = data_dir / "keys-used.json"
        self._clock = clock
        self._version = _version(self._path)
        self._keys = {key.id: key for key in _read_keys(self._path)}
        self._used = _read_used(self._used_path)

    @property
    def is_open(self) -> bool:
        """Whether no keys are in use, so that everybody may do everything."""
        self._refresh()
        return not self._keys

    def find(self, presented: str) -> Key | None:
        """The valid key that was presented; None for anything else."""
        self._refresh()
        parts = _KEY.fullmatch(presented)
        key = self._keys.get(parts[1]) if parts else None
        # What is compared is a digest, in constant time: how long a refusal takes says nothing.
        stored = key.digest if key is not None else _NOBODY
        if not hmac.compare_digest(_digest(presented), stored) or key is None or key.revoked_at is not None:
            return None
        self._note_use(key.id)
        return key

    def _refresh(self) -> None:
        version = _version(self._path)
        if version == self._version:
            return
        self._version = version
        if version is None:
            log.error("%s is gone; the keys that it had stay valid until the server restarts", self._path)
            return
        try:
            self._keys = {key.id: key for key in _read_keys(self._path)} or self._keys
        except StoreError as error:
            log.error("%s; the keys that were valid stay valid", error)

    def _note_use(self, id: str) -> None:
        now = self._clock()
        # A use that is ahead of the clock was noted before that was set back.
        if 0.0 <= now - self._used.get(id, 0.0) < _USED_EVERY_S:
            return
        self._used[id] = now
        try:
            # A few hundred bytes into the page cache: cheaper here than a thread to hand them to.
            _replace(self._used_path, self._used, durable=False)
        except OSError as error:
            log.warning("the last use of key %s could not be written: %s", id, error)


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


_NOBODY = _digest("")


def _version(path: Path) -> tuple[int, int, int] | None:
    """Changes whenever the file does."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size


def _read_keys(path: Path) -> list[Key]:
    try:
        document = json.loads(path.read_bytes())
        if document["format"] != _FORMAT:
            raise StoreError(f"{path} was written by another version of Dormouse; use that one")
        return [Key(**row) for row in document["keys"]]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise StoreError(f"{path} cannot be read ({error}); mend it, or make the keys anew") from error


def _read_used(path: Path) -> dict[str, float]:
    try:
        return {str(key): float(moment) for key, moment in json.loads(path.read_bytes()).items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}  # A convenience; a server goes on without it.


def _replace(path: Path, document: dict[str, Any], *, durable: bool = True) -> None:
    """Write the file anew, for its owner only, in one piece."""
    fresh = path.with_suffix(".tmp")
    with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        json.dump(document, file, indent=1)
        file.flush()
        if durable:
            os.fsync(file.fileno())
    fresh.replace(path)
    if durable:
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
