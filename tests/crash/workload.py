"""A store at work that is killed at every step it takes on disk, one process per step.

    python -m tests.crash.workload BASE kill|power plain|sealed

For each step in turn a child works in `BASE/<number>` and ends without any clean-up right before that step
(right in the middle of it, for writes). `BASE/<number>/told` lists what the child was told to be
durable, written before the next step could happen. The last child ends by itself. `power` also takes
back whatever was not synced.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from tests.store.kit import CACHE, NAMESPACE, QUOTA, FaultyOps, links_of, put_all, update_of

from dormouse.store.block_store import BlockStore
from dormouse.store.master_key import MasterKeyFile

SPLIT_WRITE_NBYTES = 5000
KILLED = 9

HISTORIES: list[tuple[str, list[int]]] = [
    ("ada", list(range(20))),
    ("bob", [*range(16), *[2] * 10]),
    ("ada", list(range(40))),
    ("ada", list(range(45))),
    ("bob", [*range(16), *[3] * 20]),
]


class KillingOps(FaultyOps):
    """Ends the process at the step of that number."""

    def __init__(self, kill_at: int) -> None:
        super().__init__(self._count)
        self._left = kill_at

    def _count(self, step: str, what: object) -> None:
        if self._left == 0:
            if step == "write" and isinstance(what, int):
                os.write(what, bytes(SPLIT_WRITE_NBYTES))
            self.die()
        self._left -= 1

    def die(self) -> None:
        """End without any clean-up."""
        os._exit(KILLED)


class PowerCutOps(KillingOps):
    """As above, and what was not synced by then is undone: the worst that a file system may do."""

    def __init__(self, kill_at: int, stash: Path) -> None:
        super().__init__(kill_at)
        self._stash = stash
        self._undo: dict[Path, list[Callable[[], object]]] = {}
        self._unsynced: dict[int, Path] = {}

    def make_folder(self, folder: Path) -> None:
        if not folder.exists():
            self._later(folder.parent, lambda: shutil.rmtree(folder, ignore_errors=True))
        super().make_folder(folder)

    def open_temp(self, path: Path) -> int:
        fd = super().open_temp(path)
        self._unsynced[fd] = path
        return fd

    def fsync(self, fd: int) -> None:
        super().fsync(fd)
        del self._unsynced[fd]

    def rename(self, source: Path, target: Path) -> None:
        before = self._keep(target)
        super().rename(source, target)

        def undo() -> None:
            if target.exists():
                target.rename(source)
            if before.exists():
                before.rename(target)

        self._later(target.parent, undo)

    def unlink(self, path: Path) -> None:
        kept = self._keep(path)
        super().unlink(path)
        self._later(path.parent, lambda: kept.exists() and not path.exists() and kept.rename(path))

    def fsync_folder(self, folder: Path) -> None:
        super().fsync_folder(folder)
        self._undo.pop(folder, None)

    def die(self) -> None:
        for path in self._unsynced.values():
            os.truncate(path, 0)
        for steps in self._undo.values():
            for undo in reversed(steps):
                undo()
        super().die()

    def _keep(self, path: Path) -> Path:
        """Where the file that `path` names now is found again."""
        kept = self._stash / f"{len(list(self._stash.iterdir()))}"
        if path.exists():
            kept.hardlink_to(path)
        return kept

    def _later(self, folder: Path, undo: Callable[[], object]) -> None:
        self._undo.setdefault(folder, []).append(undo)


def work(folder: Path, ops: FaultyOps, keys: MasterKeyFile | None) -> None:
    """Agents that talk, diverge, fork and are deleted; tails that grow."""
    store = BlockStore.open(folder / "data", quota_nbytes=QUOTA, file_ops=ops, key_source=keys)
    store.register(NAMESPACE, CACHE, tenant="acme")
    with (folder / "told").open("a", buffering=1) as told:
        for number, (name, tokens) in enumerate(HISTORIES):
            links = links_of(tokens)
            put_all(store, links)
            store.save_agent(update_of(name, links, rest=[number]))
            if store.flush():
                told.write(f"saved {number}\n")
        told.write("deleting bob\n")
        store.delete_agent("acme", "bob")
        told.write("deleted bob\n")
        store.gc()
    store.close()


def master_key(folder: Path) -> MasterKeyFile:
    """That of an encrypted store in `folder`."""
    return MasterKeyFile(folder / "keys" / "master.key")


def main(base: Path, cut_power: bool, sealed: bool) -> None:
    """Fork a child per step until one reaches the end."""
    number = 0
    ended = -1
    while ended != 0:
        folder = base / str(number)
        (folder / "stash").mkdir(parents=True)
        child = os.fork()
        if child == 0:
            ops = PowerCutOps(number, folder / "stash") if cut_power else KillingOps(number)
            work(folder, ops, master_key(folder) if sealed else None)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        ended = os.waitstatus_to_exitcode(status)
        assert ended in (0, KILLED), f"child {number} ended with {ended}"
        number += 1


if __name__ == "__main__":
    main(Path(sys.argv[1]), cut_power=sys.argv[2] == "power", sealed=sys.argv[3] == "sealed")
