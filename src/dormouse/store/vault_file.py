"""`vault.json`: the wrapped keys of an encrypted data folder, and how far it is encrypted."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Any

from dormouse.domain.errors import StoreError
from dormouse.store.file_ops import FileOps
from dormouse.store.layout import VAULT_NAME, temp_of

_FORMAT = 1
_OLD_SUFFIX = ".old"


class VaultState(StrEnum):
    """Where a conversion stands; see `conversion`."""

    ON = "on"
    ENCRYPTING = "encrypting"
    """The plain store counts; the encrypted one is being written."""
    WIPING_PLAIN = "wiping_plain"
    """The encrypted store counts; what is left of the plain one goes."""
    DECRYPTING = "decrypting"
    """The encrypted store counts; the plain one is being written."""
    DROPPING_SEALED = "dropping_sealed"
    """The plain store counts; the encrypted one goes, and the keys last."""


class VaultFile:
    """The file, written in one piece. Methods raise OSError."""

    def __init__(self, root: Path, ops: FileOps) -> None:
        self.path = root / VAULT_NAME
        self._ops = ops
        self._old = self.path.with_suffix(_OLD_SUFFIX)

    def write(self, document: dict[str, Any]) -> None:
        """Say this from now on; the bytes of what the file said before are overwritten."""
        ops, temp = self._ops, temp_of(self.path)
        fd = ops.open_temp(temp)
        try:
            ops.write(fd, [json.dumps({"format": _FORMAT, **document}, indent=1).encode()])
            ops.fsync(fd)
        finally:
            ops.close(fd)
        self._old.unlink(missing_ok=True)
        if self.path.exists():
            self._old.hardlink_to(self.path)
        ops.rename(temp, self.path)
        ops.fsync_folder(self.path.parent)
        self._drop_old()

    def clean(self) -> None:
        """Remove what a crash left of an earlier file."""
        self._ops.unlink(temp_of(self.path))
        self._drop_old()

    def remove(self) -> None:
        """Remove it for good."""
        # By one rename, so that no crash leaves a file that is half overwritten.
        self._ops.rename(self.path, self._old)
        self._ops.fsync_folder(self.path.parent)
        self._drop_old()

    def _drop_old(self) -> None:
        if self._old.exists() and not (self.path.exists() and self._old.samefile(self.path)):
            self._ops.wipe(self._old)
        self._ops.unlink(self._old)


def has_vault(root: Path) -> bool:
    """Whether the folder is encrypted, or on the way to or from it."""
    return (root / VAULT_NAME).exists()


def read_vault(root: Path) -> dict[str, Any]:
    """What `vault.json` says; its keys are wrapped. Raises StoreError."""
    path = root / VAULT_NAME
    try:
        document: dict[str, Any] = json.loads(path.read_bytes())
        if document["format"] != _FORMAT:
            raise StoreError(f"{path} was written by another version of Dormouse; use that one")
        VaultState(document["state"])
        bytes.fromhex(document["store"])
        int(document["generation"])
        for text in (*document["keys"], *document["keys"].values(), *document["destroyed"]):
            bytes.fromhex(text)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise StoreError(f"{path} cannot be read ({error}); bring it back from a copy") from error
    return document
