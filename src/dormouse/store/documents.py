"""Documents: named bodies of a tenant, by kind. Metadata in memory, bodies in the catalog.

| state    | enters by              | leaves by                              |
| -------- | ---------------------- | -------------------------------------- |
| unsaved  | `put`, `delete`        | `apply` of the change that holds it    |
| cached   | `apply`, `remember`    | the oldest used first, above a bound   |
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from threading import Lock
from typing import NamedTuple

from dormouse.domain.errors import DocumentsFull
from dormouse.store.rows import DocumentId, DocumentRow

CACHE_NBYTES = 32 << 20

Demand = list[tuple[tuple[str, str], int, int]]
"""Tenant and kind, and the count and bytes that they would have."""


class DocumentInfo(NamedTuple):
    """A document without its body. Times are Unix seconds."""

    id: str
    created_at: float
    used_at: float
    nbytes: int


@dataclass(frozen=True, slots=True)
class DocumentBounds:
    """How many documents, and how many bytes of them, a tenant may have of each kind.

    Above that the least recently used go; `kept_kinds` never do, one more of them is refused. All tenants
    together have `max_kept_nbytes` of those.
    """

    max_count: int
    max_nbytes: int
    kept_kinds: frozenset[str]
    max_kept_nbytes: int


class Documents:
    """Thread-safe. Nothing here waits for the disk: the writer takes what is unsaved."""

    def __init__(
        self, bounds: DocumentBounds, stored: Iterable[tuple[DocumentId, float, float, int]] = ()
    ) -> None:
        self._lock = Lock()
        self.bounds = bounds
        # Per tenant and kind, the longest unused first.
        self._groups: dict[tuple[str, str], OrderedDict[str, DocumentInfo]] = {}
        self._nbytes: dict[tuple[str, str], int] = {}
        self._unsaved: dict[DocumentId, DocumentRow | None] = {}
        self._used: dict[DocumentId, float] = {}
        # What the catalog has, and what the change may bring there that is being written: of anything else
        # it need not be told that it goes.
        self._stored: set[DocumentId] = set()
        self._planned: set[DocumentId] = set()
        self._cache: OrderedDict[DocumentId, bytes] = OrderedDict()
        self._cache_nbytes = 0
        for who, created_at, used_at, nbytes in sorted(stored, key=lambda entry: entry[2]):
            self._stored.add(who)
            self._enter(who, DocumentInfo(who.id, created_at, used_at, nbytes))

    @property
    def unsaved_nbytes(self) -> int:
        """Bytes of the bodies that wait to be written."""
        with self._lock:
            return sum(len(row.body) for row in self._unsaved.values() if row is not None)

    @property
    def has_unsaved(self) -> bool:
        """Whether anything waits to be written."""
        return bool(self._unsaved)

    def put(self, who: DocumentId, body: bytes, now: float) -> None:
        """Keep a document, in place of the one before. Raises DocumentsFull."""
        with self._lock:
            self._make_room({who: len(body)})
            before = self._info(who)
            row = DocumentRow(body, before.created_at if before else now, now)
            self._enter(who, DocumentInfo(who.id, row.created_at, now, len(body)))
            self._uncache(who)
            self._used.pop(who, None)
            self._unsaved[who] = row

    def check_room(self, sizes: Mapping[DocumentId, int]) -> None:
        """Raise DocumentsFull when documents of these sizes cannot be kept."""
        with self._lock:
            self._refuse_above(self._demand(sizes))

    def get(self, who: DocumentId, now: float) -> tuple[bool, bytes | None]:
        """Whether there is such a document, and its body where that is in memory. Counts as a use."""
        with self._lock:
            info = self._info(who)
            if info is None:
                return False, None
            group = self._groups[who.tenant, who.kind]
            group[who.id] = info._replace(used_at=now)
            group.move_to_end(who.id)
            unsaved = self._unsaved.get(who)
            if unsaved is not None:
                return True, unsaved.body
            self._used[who] = now
            if who in self._cache:
                self._cache.move_to_end(who)
            return True, self._cache.get(who)

    def remember(self, who: DocumentId, body: bytes) -> None:
        """The body was read from the catalog."""
        with self._lock:
            if self._info(who) is not None and who not in self._unsaved:
                self._recache(who, body)

    def delete(self, who: DocumentId) -> bool:
        """Forget a document; whether there was one."""
        with self._lock:
            found = self._info(who) is not None
            if found:
                self._drop(who)
            return found

    def page(self, tenant: str, kind: str, limit: int, after: str | None) -> list[DocumentInfo]:
        """Up to `limit` documents, in the order of their ids, from behind `after` on."""
        with self._lock:
            group = list(self._groups.get((tenant, kind), {}).values())
        return sorted(info for info in group if after is None or info.id > after)[:limit]

    def unsaved(self) -> tuple[dict[DocumentId, DocumentRow | None], dict[DocumentId, float]]:
        """What is to be written: documents, None for those that are deleted, and uses. The change before
        was applied, or failed."""
        with self._lock:
            rows = self._unsaved.items()
            self._unsaved = {who: row for who, row in rows if row is not None or who in self._stored}
            self._planned = set(self._unsaved)
            return dict(self._unsaved), dict(self._used)

    def apply(self, rows: Mapping[DocumentId, DocumentRow | None], used: Mapping[DocumentId, float]) -> None:
        """These are committed."""
        with self._lock:
            for who, at in used.items():
                if self._used.get(who) == at:
                    del self._used[who]
            for who, row in rows.items():
                unsaved = self._unsaved.get(who)
                if row is None:
                    self._stored.discard(who)
                    if unsaved is None:  # else it was put again meanwhile
                        self._drop(who)
                        self._unsaved.pop(who, None)
                    continue
                self._stored.add(who)
                if who not in self._unsaved or unsaved is row:
                    self._unsaved.pop(who, None)
                    used_at = max(row.used_at, info.used_at) if (info := self._info(who)) else row.used_at
                    self._enter(who, DocumentInfo(who.id, row.created_at, used_at, len(row.body)))
                    self._recache(who, row.body)

    def check(self) -> None:
        """Raise AssertionError when the books do not balance."""
        with self._lock:
            for key, group in self._groups.items():
                assert self._nbytes[key] == sum(info.nbytes for info in group.values())
            assert self._cache_nbytes == sum(map(len, self._cache.values()))

    def _info(self, who: DocumentId) -> DocumentInfo | None:
        group = self._groups.get((who.tenant, who.kind))
        return group.get(who.id) if group is not None else None

    def _demand(self, sizes: Mapping[DocumentId, int]) -> Demand:
        """Per group, the count and bytes that it would have, were nothing evicted."""
        groups = {(who.tenant, who.kind) for who in sizes}
        demand = []
        for group in groups:
            infos: Mapping[str, DocumentInfo] = self._groups.get(group, {})
            count, nbytes = len(infos), self._nbytes.get(group, 0)
            for who, size in sizes.items():
                if (who.tenant, who.kind) == group:
                    before = infos.get(who.id)
                    count += before is None
                    nbytes += size - (before.nbytes if before else 0)
            demand.append((group, count, nbytes))
        return demand

    def _refuse_above(self, demand: Demand) -> None:
        bounds = self.bounds
        kept = {group: (count, nbytes) for group, count, nbytes in demand if group[1] in bounds.kept_kinds}
        for (_, kind), (count, nbytes) in kept.items():
            if count > bounds.max_count or nbytes > bounds.max_nbytes:
                raise DocumentsFull(
                    f"{count} documents of kind {kind!r} with {nbytes} bytes are over the bound of "
                    f"{bounds.max_count} and {bounds.max_nbytes} bytes; delete some, or send less"
                )
        more = sum(nbytes - self._nbytes.get(group, 0) for group, (_, nbytes) in kept.items())
        if more > 0 and self._kept_nbytes() + more > bounds.max_kept_nbytes:
            raise DocumentsFull(
                f"documents of all tenants would take more than {bounds.max_kept_nbytes} bytes, a quarter of "
                "the disk quota; delete agents or checkpoints, or raise the quota"
            )

    def _kept_nbytes(self) -> int:
        return sum(nbytes for (_, kind), nbytes in self._nbytes.items() if kind in self.bounds.kept_kinds)

    def _make_room(self, sizes: Mapping[DocumentId, int]) -> None:
        largest = max(sizes.values())
        if largest > self.bounds.max_nbytes:
            raise DocumentsFull(
                f"a document of {largest} bytes is over the bound of {self.bounds.max_nbytes}; send less"
            )
        demand = self._demand(sizes)
        self._refuse_above(demand)
        for group, count, nbytes in demand:
            spared = {who.id for who in sizes if (who.tenant, who.kind) == group}
            for info in list(self._groups.get(group, OrderedDict()).values()):
                if count <= self.bounds.max_count and nbytes <= self.bounds.max_nbytes:
                    break
                if info.id not in spared:
                    self._drop(DocumentId(*group, info.id))
                    count -= 1
                    nbytes -= info.nbytes

    def _enter(self, who: DocumentId, info: DocumentInfo) -> None:
        group = self._groups.setdefault((who.tenant, who.kind), OrderedDict())
        before = group.pop(who.id, None)
        group[who.id] = info
        nbytes = self._nbytes.get((who.tenant, who.kind), 0)
        self._nbytes[who.tenant, who.kind] = nbytes + info.nbytes - (before.nbytes if before else 0)

    def _drop(self, who: DocumentId) -> None:
        """Forget a document here; that the catalog is to forget it too is unsaved."""
        info = self._groups.get((who.tenant, who.kind), OrderedDict()).pop(who.id, None)
        if info is not None:
            self._nbytes[who.tenant, who.kind] -= info.nbytes
        self._uncache(who)
        self._used.pop(who, None)
        self._unsaved.pop(who, None)
        if who in self._stored or who in self._planned:
            self._unsaved[who] = None

    def _recache(self, who: DocumentId, body: bytes) -> None:
        self._uncache(who)
        self._cache[who] = body
        self._cache_nbytes += len(body)
        while self._cache_nbytes > CACHE_NBYTES:
            _, dropped = self._cache.popitem(last=False)
            self._cache_nbytes -= len(dropped)

    def _uncache(self, who: DocumentId) -> None:
        self._cache_nbytes -= len(self._cache.pop(who, b""))
