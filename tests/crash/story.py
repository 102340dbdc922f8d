"""What happens in the life of a store, chapter by chapter, and what is promised after each: replies, tails
that grow, forks, checkpoints, roll-backs, deletions, evictions, documents, an agent that moves out and in."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.store.kit import CACHE, NAMESPACE, Clock, agent_id, block_files, links_of, put_all, save

from dormouse.domain.blocks import BlockKey
from dormouse.domain.errors import AgentExists, AgentNotFound, CheckpointNotFound, StoreError
from dormouse.store.block_store import BlockStore
from dormouse.store.file_ops import FileOps
from dormouse.store.options import StoreOptions

QUOTA = 1 << 20
"""Small, so that the last chapters evict."""

TENANT = "acme"
FINGERPRINT = "toy model"
"""What the namespace of the kit is made of."""
DOCUMENTS = [("response", "r1"), ("response", "r2"), ("transcript", "ada"), ("transcript", "eve")]
REPLIES = [b"hello", b"again"]


@dataclass
class Desk:
    """A store at work, and what was carried out of it."""

    folder: Path
    store: BlockStore
    clock: Clock
    file: bytes = b""

    @classmethod
    def open(cls, folder: Path, ops: FileOps | None = None, *, quota_nbytes: int = QUOTA) -> Desk:
        """The store in `folder`, with its one cache registered."""
        clock = Clock()
        options = StoreOptions(retry_s=0.01)
        store = BlockStore.open(folder, quota_nbytes=quota_nbytes, file_ops=ops, options=options, clock=clock)
        store.register(NAMESPACE, CACHE)
        return cls(folder, store, clock)

    def reply(self, name: str, tokens: list[int], rest: tuple[int, ...] = ()) -> None:
        """What the end of a reply does. Raises StoreError when it is not on disk."""
        self.clock.advance(1)
        links = links_of(tokens)
        put_all(self.store, links)
        if not save(self.store, name, links, rest):
            raise StoreError("not on disk")


@dataclass(frozen=True)
class State:
    """What a store holds. Histories by agent, tokens by agent and checkpoint."""

    agents: dict[str, tuple[int, ...]] = field(default_factory=dict)
    checkpoints: dict[tuple[str, str], int] = field(default_factory=dict)
    documents: dict[tuple[str, str], bytes] = field(default_factory=dict)
    replies: dict[bytes, tuple[int, ...]] = field(default_factory=dict)
    stored: frozenset[BlockKey] = frozenset()

    @classmethod
    def of(cls, desk: Desk) -> State:
        """What an open store answers."""
        store = desk.store
        names = [agent.id.name for agent in store.agents()]
        tags = {(name, tag.tag): tag.num_tokens for name in names for tag in store.admin.tags(TENANT, name)}
        bodies = {(kind, name): store.notebook.get(TENANT, kind, name) for kind, name in DOCUMENTS}
        tokens = {key: store.notebook.recall(NAMESPACE, key) for key in REPLIES}
        keys = [BlockKey(bytes.fromhex(name)) for name in block_files(desk.folder)]
        return cls(
            {name: tuple(store.history(agent_id(name))) for name in names},
            tags,
            {who: body for who, body in bodies.items() if body is not None},
            {key: found for key, found in tokens.items() if found is not None},
            frozenset(key for key in keys if store.has_durable(key)),
        )


def ada(num_tokens: int) -> list[int]:
    """Ada's words; she says the same ones again after a roll-back, up to where she says others."""
    return list(range(num_tokens))


Chapter = Callable[[Desk], None]


def says(name: str, tokens: list[int], rest: tuple[int, ...] = ()) -> Chapter:
    """A reply ends."""
    return lambda desk: desk.reply(name, tokens, rest)


def _notes(desk: Desk) -> None:
    desk.store.notebook.put(TENANT, "response", "r1", b"[1]")
    desk.store.notebook.put(TENANT, "transcript", "ada", b"[%s2]" % (b"2," * 1000))
    desk.store.notebook.remember(NAMESPACE, b"hello", [1, 2, 3])
    _settle(desk)


def _more_notes(desk: Desk) -> None:
    desk.store.notebook.put(TENANT, "response", "r1", b"[11]")
    desk.store.notebook.put(TENANT, "response", "r2", b"[12]")
    desk.store.notebook.remember(NAMESPACE, b"again", [4, 5])
    _settle(desk)


def _a_note_goes(desk: Desk) -> None:
    desk.store.notebook.delete(TENANT, "response", "r1")
    _settle(desk)


def _fork(desk: Desk) -> None:
    _unless_done(lambda: desk.store.admin.fork(TENANT, "ada", "eve"))


def _tag(desk: Desk) -> None:
    _unless_done(lambda: desk.store.admin.tag(TENANT, "ada", "before"))


def _roll_back(desk: Desk) -> None:
    desk.store.admin.rollback(TENANT, "ada", "before")


def _collect(desk: Desk) -> None:
    desk.clock.advance(1)
    desk.store.gc()


def _move_out(desk: Desk) -> None:
    desk.store.register(NAMESPACE, CACHE, FINGERPRINT)
    _settle(desk)
    desk.file = desk.file or b"".join(desk.store.admin.export(TENANT, "eve"))


def _move_in(desk: Desk) -> None:
    file = io.BytesIO(desk.file)
    _unless_done(lambda: desk.store.admin.load(file, len(desk.file), TENANT, name="eva"))


def _untag(desk: Desk) -> None:
    _unless_gone(lambda: desk.store.admin.untag(TENANT, "ada", "before"))


def _deletes(name: str) -> Chapter:
    return lambda desk: _unless_gone(lambda: desk.store.delete_agent(TENANT, name))


STORY: tuple[Chapter, ...] = (
    says("ada", ada(40)),
    says("bob", [*range(16), *[2] * 10]),
    says("ada", ada(45)),
    says("ada", ada(90), (7,)),
    says("bob", [*range(16), *[3] * 20]),
    _notes,
    _fork,
    says("eve", [*ada(80), *[4] * 30]),
    _tag,
    says("ada", [*ada(90), *[5] * 30]),
    _roll_back,
    _collect,
    _more_notes,
    _a_note_goes,
    _move_out,
    _deletes("eve"),
    _move_in,
    lambda desk: desk.store.admin.configure(TENANT, "ada", pinned=True),
    lambda desk: desk.store.admin.configure(TENANT, "bob", quota_nbytes=8000),
    *(says(f"crowd{first}", [first] * 16 * 16) for first in range(100, 104)),
    _untag,
    _deletes("bob"),
    says("ada", ada(100)),
    _collect,
)
"""Each can be told again when it failed. Raises StoreError then."""


def _settle(desk: Desk) -> None:
    if not desk.store.flush():
        raise StoreError("not on disk")


def _unless_done(action: Callable[[], object]) -> None:
    try:
        action()
    except AgentExists:
        return  # of the time before


def _unless_gone(action: Callable[[], object]) -> None:
    try:
        action()
    except (AgentNotFound, CheckpointNotFound):
        return
