"""A log of everything that a store does to its disk, with data, and what a power cut could leave of it.

The model, which docs/durability.md explains: what was written is on disk once its file was synced, names once
their folder was. Until then a cut keeps or loses each write, sector by sector, and each name, independently.
SQLite's own writes are found by comparing its files before and after each commit and each fold: a commit
appends to the log and syncs it; a fold writes the database, syncs it, and then empties the log. Of a log that
begins anew the header is synced before anything else, and its salt makes what lies behind it from before no
part of it (walWriteFrames in SQLite's wal.c). The first page of a new database goes through a rollback
journal: it is written whole or not at all (https://www.sqlite.org/atomiccommit.html).
"""

from __future__ import annotations

import os
import random
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dormouse.store.file_ops import FileOps

SECTOR = 512
DATABASE = "catalog.sqlite"
WAL = f"{DATABASE}-wal"
WAL_HEADER = 32
CATALOG = (DATABASE, WAL)


@dataclass(frozen=True, slots=True)
class Step:
    """One thing done to the disk: `kind` to `path`, with what it took. Paths are below the data folder."""

    kind: str
    path: str = ""
    other: str = ""
    offset: int = 0
    data: bytes = b""


class LoggingOps(FileOps):
    """Real files, and a log. `mark` enters what happened beside the disk."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._open: dict[int, str] = {}
        self._sizes: dict[str, int] = {}
        self._catalog = dict.fromkeys(CATALOG, b"")
        self.steps: list[Step] = []

    def mark(self, kind: str, name: str) -> None:
        """Enter a mark."""
        self.steps.append(Step(kind, name))

    def make_folder(self, folder: Path) -> None:
        """See `FileOps`."""
        if folder != self._root and not folder.exists():
            self._log("make_folder", folder)
        super().make_folder(folder)

    def open_temp(self, path: Path) -> int:
        """See `FileOps`."""
        fd = super().open_temp(path)
        self._open[fd] = self._log("create", path)
        self._sizes[self._open[fd]] = 0
        return fd

    def write(self, fd: int, parts: Sequence[bytes]) -> None:
        """See `FileOps`."""
        path = self._open[fd]
        data = b"".join(parts)
        self.steps.append(Step("write", path, offset=self._sizes[path], data=data))
        self._sizes[path] += len(data)
        super().write(fd, parts)

    def fsync(self, fd: int) -> None:
        """See `FileOps`."""
        super().fsync(fd)
        self.steps.append(Step("sync", self._open[fd]))

    def close(self, fd: int) -> None:
        """See `FileOps`."""
        del self._open[fd]
        super().close(fd)

    def rename(self, source: Path, target: Path) -> None:
        """See `FileOps`."""
        self.steps.append(Step("rename", self._name(source), self._name(target)))
        super().rename(source, target)

    def fsync_folder(self, folder: Path) -> None:
        """See `FileOps`."""
        super().fsync_folder(folder)
        if folder.is_relative_to(self._root):
            self._log("sync_folder", folder)

    def wipe(self, path: Path) -> None:
        """See `FileOps`."""
        if path.exists():
            name = self._log("write", path, data=bytes(path.stat().st_size))
            super().wipe(path)
            self.steps.append(Step("sync", name))

    def unlink(self, path: Path) -> None:
        """See `FileOps`."""
        if path.exists():
            self._log("unlink", path)
        super().unlink(path)

    def commit(self, connection: sqlite3.Connection) -> None:
        """See `FileOps`."""
        super().commit(connection)
        self._compare()

    def fold(self, connection: sqlite3.Connection) -> None:
        """See `FileOps`."""
        super().fold(connection)
        self._compare()

    def _compare(self) -> None:
        """Log what SQLite did, in the order in which it does things."""
        before = self._catalog
        self._catalog = {name: _content(self._root / name) for name in CATALOG}
        # The database comes first where there is no log yet, and after the log when that is folded in.
        for name in reversed(CATALOG) if before[WAL] else CATALOG:
            old, new = before[name], self._catalog[name]
            if name == DATABASE and not old and new:
                self.steps.append(Step("journaled", name, data=new))
                continue
            if name == WAL and not old and new:
                self.steps += [Step("write", name, data=new[:WAL_HEADER]), Step("sync", name)]
            writes = list(_differences(name, old, new))
            self.steps += writes
            if writes:
                self.steps.append(Step("sync", name))
        if len(self._catalog[WAL]) < len(before[WAL]):
            self.steps.append(Step("truncate", WAL, offset=len(self._catalog[WAL])))

    def _name(self, path: Path) -> str:
        return "" if path == self._root else str(path.relative_to(self._root))

    def _log(self, kind: str, path: Path, *, data: bytes = b"") -> str:
        name = self._name(path)
        self.steps.append(Step(kind, name, data=data))
        return name


Keep = Callable[[], bool]
"""Whether the next unsynced thing survived."""


@dataclass
class _File:
    """`synced` bytes, and writes since: of bytes at an offset, or of an end (None)."""

    synced: bytearray = field(default_factory=bytearray)
    unsynced: list[tuple[int, bytes | None]] = field(default_factory=list)

    def content(self, keep: Keep) -> bytes:
        """What is left, when each sector is kept or not."""
        found = bytearray(self.synced)
        for offset, data in self.unsynced:
            if data is None:
                if keep():
                    del found[offset:]
                continue
            for start, piece in _sectors(offset, data):
                if keep():
                    found.extend(bytes(max(0, start - len(found))))
                    found[start : start + len(piece)] = piece
        return bytes(found)

    def sync(self) -> None:
        """All of it is on disk."""
        self.synced = bytearray(self.content(lambda: True))
        self.unsynced.clear()


@dataclass(frozen=True, slots=True)
class _Naming:
    """A name that comes (`file`) or goes (None), in its folder. Both halves of a rename are one."""

    names: tuple[tuple[str, _File | None], ...]


class Disk:
    """What the steps so far have made of a disk. Folders need their names synced like files."""

    def __init__(self) -> None:
        self._now: dict[str, _File] = {name: _File() for name in CATALOG}
        self._synced: dict[str, _File] = dict(self._now)
        self._unsynced: list[_Naming] = []
        self._folders: set[str] = {"blocks", "quarantine"}
        self._synced_folders = set(self._folders)

    def do(self, step: Step) -> None:
        """One more step."""
        match step.kind:
            case "create":
                file = self._now.get(step.path)
                if file is None:
                    self._name((step.path, _File()))
                else:
                    file.unsynced.append((0, None))
            case "write":
                self._now[step.path].unsynced.append((step.offset, step.data))
            case "truncate":
                self._now[step.path].unsynced.append((step.offset, None))
            case "journaled":
                self._now[step.path].synced[:] = step.data
            case "sync":
                self._now[step.path].sync()
            case "rename":
                self._name((step.path, None), (step.other, self._now[step.path]))
            case "unlink":
                self._name((step.path, None))
            case "make_folder":
                self._folders.add(step.path)
            case "sync_folder":
                self._sync_folder(step.path)

    def leave(self, folder: Path, keep: Keep) -> None:
        """Write what a power cut now would leave into an empty `folder`."""
        names = dict(self._synced)
        for naming in self._unsynced:
            if keep():
                names.update((name, file) for name, file in naming.names if file is not None)
                for name, file in naming.names:
                    if file is None:
                        names.pop(name, None)
        folders = {path for path in sorted(self._folders) if path in self._synced_folders or keep()}
        for path in sorted(folders):
            if _is_there(path, folders):
                (folder / path).mkdir(mode=0o700, parents=True, exist_ok=True)
        for name, file in names.items():
            parent = os.path.dirname(name)  # noqa: PTH120 - of a name, not of a file
            if not parent or _is_there(parent, folders):
                content = file.content(keep)
                if content or name not in CATALOG:
                    (folder / name).write_bytes(content)

    def _name(self, *names: tuple[str, _File | None]) -> None:
        self._unsynced.append(_Naming(names))
        for name, file in names:
            if file is None:
                self._now.pop(name, None)
            else:
                self._now[name] = file

    def _sync_folder(self, folder: str) -> None:
        self._synced_folders |= {path for path in self._folders if os.path.dirname(path) == folder}  # noqa: PTH120
        left = []
        for naming in self._unsynced:
            if all(os.path.dirname(name) == folder for name, _ in naming.names):  # noqa: PTH120
                for name, file in naming.names:
                    if file is None:
                        self._synced.pop(name, None)
                    else:
                        self._synced[name] = file
            else:
                left.append(naming)
        self._unsynced = left


def nothing_unsynced() -> Keep:
    """All that was not synced is lost."""
    return lambda: False


def everything() -> Keep:
    """All of it survives, as it does a SIGKILL."""
    return lambda: True


def drawn(seed: int) -> Keep:
    """Each thing by chance; how likely it is, too."""
    rng = random.Random(seed)
    share = rng.choice((0.1, 0.5, 0.9))
    return lambda: rng.random() < share


def _is_there(path: str, folders: set[str]) -> bool:
    parts = path.split("/")
    return all("/".join(parts[:end]) in folders for end in range(1, len(parts) + 1))


def _sectors(offset: int, data: bytes) -> Iterator[tuple[int, bytes]]:
    """The pieces of a write that a disk writes whole."""
    start = offset
    while start < offset + len(data):
        end = min(offset + len(data), (start // SECTOR + 1) * SECTOR)
        yield start, data[start - offset : end - offset]
        start = end


def _differences(name: str, old: bytes, new: bytes) -> Iterator[Step]:
    """Writes that make `old` into `new`, as far as that is long; equal sectors are left out."""
    for start, piece in _sectors(0, new):
        if old[start : start + len(piece)] != piece:
            yield Step("write", name, offset=start, data=piece)


def _content(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""
