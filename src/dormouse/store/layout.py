"""Where things lie below the data folder. Only keys and namespaces become paths, never names.

An encrypted store has a catalog and a folder of blocks of its own: so a folder can be converted beside
what it holds, and one rename decides which of the two counts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from dormouse.domain.blocks import BlockKey, Namespace

BLOCK_SUFFIX = ".safetensors"
TEMP_SUFFIX = ".tmp"
VAULT_NAME = "vault.json"
FOLDER_MODE = 0o700
FILE_MODE = 0o600


@dataclass(frozen=True, slots=True)
class Layout:
    """Paths of one data folder. `seal_key` is that of an encrypted one: what a block is called there."""

    root: Path
    seal_key: Callable[[BlockKey], bytes] | None = field(default=None, repr=False)

    @property
    def lock(self) -> Path:
        """Held by the owning process."""
        return self.root / "store.lock"

    @property
    def vault(self) -> Path:
        """The wrapped keys of an encrypted folder."""
        return self.root / VAULT_NAME

    @property
    def catalog(self) -> Path:
        """The SQLite database."""
        return self.root / ("catalog.sqlite" if self.seal_key is None else "sealed-catalog.sqlite")

    @property
    def catalog_files(self) -> tuple[Path, ...]:
        """The database and what SQLite keeps next to it."""
        name = self.catalog.name
        return tuple(self.root / f"{name}{suffix}" for suffix in ("", "-wal", "-shm", "-journal"))

    @property
    def blocks(self) -> Path:
        """`<namespace>/<first two hex digits of name>/<name>.safetensors` below here."""
        return self.root / ("blocks" if self.seal_key is None else "sealed-blocks")

    @property
    def quarantine(self) -> Path:
        """Files that could not be trusted."""
        return self.root / "quarantine"

    def block(self, namespace: Namespace, key: BlockKey) -> Path:
        """The file of one block."""
        return self.blocks / self.block_name(namespace, key)

    def block_name(self, namespace: Namespace, key: BlockKey) -> str:
        """Path of a block's file below `blocks`."""
        name = (key if self.seal_key is None else self.seal_key(key)).hex()
        return f"{namespace.hex()}/{name[:2]}/{name}{BLOCK_SUFFIX}"


def temp_of(path: Path) -> Path:
    """Where the file that will be `path` is written: same folder, so that the rename is atomic."""
    return path.with_suffix(TEMP_SUFFIX)
