"""Where things lie below the data folder. Only keys and namespaces become paths, never names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dormouse.domain.blocks import KEY_NBYTES, NAMESPACE_NBYTES, BlockKey, Namespace

BLOCK_SUFFIX = ".safetensors"
TEMP_SUFFIX = ".tmp"
FOLDER_MODE = 0o700
FILE_MODE = 0o600


@dataclass(frozen=True, slots=True)
class Layout:
    """Paths of one data folder."""

    root: Path

    @property
    def lock(self) -> Path:
        """Held by the owning process."""
        return self.root / "store.lock"

    @property
    def catalog(self) -> Path:
        """The SQLite database."""
        return self.root / "catalog.sqlite"

    @property
    def catalog_files(self) -> tuple[Path, ...]:
        """The database and what SQLite keeps next to it."""
        return tuple(self.root / f"catalog.sqlite{suffix}" for suffix in ("", "-wal", "-shm", "-journal"))

    @property
    def blocks(self) -> Path:
        """`<namespace>/<first two hex digits of key>/<key>.safetensors` below here."""
        return self.root / "blocks"

    @property
    def quarantine(self) -> Path:
        """Files that could not be trusted."""
        return self.root / "quarantine"

    def block(self, namespace: Namespace, key: BlockKey) -> Path:
        """The file of one block."""
        return self.blocks / block_name(namespace, key)

    def block_at(self, path: Path) -> tuple[Namespace, BlockKey] | None:
        """The block whose place `path` is; None when it is no block's place."""
        try:
            namespace = Namespace(bytes.fromhex(path.parent.parent.name))
            key = BlockKey(bytes.fromhex(path.name.removesuffix(BLOCK_SUFFIX)))
        except ValueError:
            return None
        right_sizes = len(namespace) == NAMESPACE_NBYTES and len(key) == KEY_NBYTES
        return (namespace, key) if right_sizes and path == self.block(namespace, key) else None


def block_name(namespace: Namespace, key: BlockKey) -> str:
    """Path of a block's file below `blocks`."""
    name = key.hex()
    return f"{namespace.hex()}/{name[:2]}/{name}{BLOCK_SUFFIX}"


def temp_of(path: Path) -> Path:
    """Where the file that will be `path` is written: same folder, so that the rename is atomic."""
    return path.with_suffix(TEMP_SUFFIX)
