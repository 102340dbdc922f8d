"""What people do to agents: create, fork, tag, roll back, configure. Nothing of it copies a block.

Everything here runs on the writer thread, in one transaction each: an error leaves the store as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from dormouse.domain.agents import MAX_CHECKPOINTS, Agent, AgentId, Checkpoint, check_tag
from dormouse.domain.blocks import ROOT
from dormouse.domain.errors import AgentExists, CheckpointNotFound, InvalidRequest
from dormouse.store.agent_import import Adoption
from dormouse.store.garbage import release_tails
from dormouse.store.index import Index
from dormouse.store.keeper import CATALOG_ROOM_NBYTES, Keeper
from dormouse.store.notes import Notes
from dormouse.store.rows import (
    CHECKPOINT_KIND,
    AgentRow,
    Change,
    CheckpointId,
    CheckpointRow,
    DocumentId,
    DocumentRow,
    agent_documents,
    checkpoint_document,
)
from dormouse.store.view import Snapshot, StoreView

TRANSCRIPT = "transcript"
FORKED_KINDS = ("agent", TRANSCRIPT)

ReadDocument = Callable[[DocumentId], bytes | None]


class AgentBook:
    """Agents as refs. Owned by the writer thread; `clock` is in Unix seconds."""

    def __init__(
        self,
        keeper: Keeper,
        index: Index,
        view: StoreView,
        notes: Notes,
        read_document: ReadDocument,
        clock: Callable[[], float],
    ) -> None:
        self._keeper = keeper
        self._index = index
        self._view = view
        self._notes = notes
        self._read_document = read_document
        self._clock = clock

    def create(
        self, id: AgentId, model: str, *, documents: Mapping[str, bytes], pinned: bool, quota_nbytes: int
    ) -> Agent:
        """An agent without history, with documents by kind. Raises AgentExists and DocumentsFull."""
        self.refuse_taken(id.tenant, id.name)
        now = self._clock()
        row = AgentRow(id, model, ROOT, b"", 0, now, now, pinned, quota_nbytes=quota_nbytes)
        bodies = {DocumentId(id.tenant, kind, id.name): body for kind, body in documents.items()}
        return self._commit_agent(row, Change(), bodies)

    def fork(self, ids: Sequence[AgentId], name: str, target: str, tag: str | None) -> Agent:
        """A new agent where `name` is now, or was at its checkpoint `tag`; with its documents.

        Raises AgentNotFound, CheckpointNotFound, AgentExists, and StoreError when the source is not on disk.
        """
        source = self._keeper.recorded(ids, name)
        start = self._tagged(source.id, tag) if tag is not None else source
        self.refuse_taken(source.id.tenant, target)
        now = self._clock()
        row = replace(
            source,
            id=replace(source.id, name=target),
            tip=start.tip,
            rest=start.rest,
            num_tokens=start.num_tokens,
            created_at=now,
            used_at=now,
            pinned=False,
            parent=name,
            parent_tokens=start.num_tokens,
        )
        return self._commit_agent(row, Change(), self._documents(source.id, target, tag))

    def configure(
        self, ids: Sequence[AgentId], name: str, *, pinned: bool | None, quota_nbytes: int | None
    ) -> None:
        """Change what is not None of all agents of that name. Raises AgentNotFound and StoreError."""
        found = [self._index.agents[one] for one in ids if one in self._index.agents]
        rows = found or [self._keeper.recorded(ids, name)]
        change = Change()
        for row in rows:
            change.agents[row.id] = replace(
                row,
                pinned=row.pinned if pinned is None else pinned,
                quota_nbytes=row.quota_nbytes if quota_nbytes is None else quota_nbytes,
            )
        self._commit(change, {})
        for row in rows:
            self._keeper.trim_to_quota(row.id)

    def tag(self, ids: Sequence[AgentId], name: str, tag: str) -> Checkpoint:
        """Name where the agent is now. Raises AgentExists when the tag is taken, and as `fork` does."""
        source = self._keeper.recorded(ids, name)
        tags = self._index.checkpoints.get(source.id, {})
        if check_tag(tag) in tags:
            raise AgentExists(
                f"agent {name!r} has a checkpoint {tag!r}; delete it first, or use another name", param="name"
            )
        if len(tags) >= MAX_CHECKPOINTS:
            raise InvalidRequest(
                f"agent {name!r} has {len(tags)} checkpoints, the most there can be; delete some"
            )
        now = self._clock()
        row = CheckpointRow(CheckpointId(source.id, tag), source.tip, source.rest, source.num_tokens, now)
        transcript = self._read_document(DocumentId(source.id.tenant, TRANSCRIPT, name))
        bodies = {} if transcript is None else {checkpoint_document(source.id.tenant, name, tag): transcript}
        self._commit(Change(checkpoints={row.id: row}), bodies)
        return Checkpoint(tag, row.tip, row.num_tokens, now)

    def untag(self, ids: Sequence[AgentId], name: str, tag: str) -> None:
        """Delete a checkpoint; its blocks are collected later. Raises as `rollback` does."""
        source = self._keeper.recorded(ids, name)
        gone = self._tagged(source.id, tag)
        change = Change(removed_checkpoints={gone.id})
        change.documents[checkpoint_document(source.id.tenant, name, tag)] = None
        release_tails(self._index, change, self._view.unsaved_tips())
        self._commit(change, {})

    def rollback(self, ids: Sequence[AgentId], name: str, tag: str) -> Agent:
        """Put the agent back to where it was at a checkpoint, which stays.

        What it said since belongs to nobody, unless a fork or checkpoint has it; `gc` or the quota removes
        it. Raises AgentNotFound, CheckpointNotFound, and StoreError when the agent is not on disk.
        """
        source = self._keeper.recorded(ids, name)
        start = self._tagged(source.id, tag)
        row = replace(
            source, tip=start.tip, rest=start.rest, num_tokens=start.num_tokens, used_at=self._clock()
        )
        transcript = DocumentId(source.id.tenant, TRANSCRIPT, name)
        then = self._read_document(checkpoint_document(source.id.tenant, name, tag))
        change = Change()
        if then is None:
            change.documents[transcript] = None
        return self._commit_agent(row, change, {} if then is None else {transcript: then})

    def adopt(self, adoption: Adoption, *, overwrite: bool) -> Agent:
        """Enter an imported agent. Raises AgentExists for a taken name, unless `overwrite`."""
        row = adoption.agent
        change = Change(checkpoints={checkpoint.id: checkpoint for checkpoint in adoption.checkpoints})
        if not overwrite:
            self.refuse_taken(row.id.tenant, row.id.name)
        for taken in self._view.named(row.id.tenant, row.id.name):
            self._replace(change, taken)
        for block in adoption.history:
            if block.key not in self._index.blocks:
                change.rows[block.key] = block
        change.removed_agents.discard(row.id)
        change.removed_checkpoints -= change.checkpoints.keys()
        return self._commit_agent(row, change, adoption.bodies)

    def _replace(self, change: Change, taken: AgentId) -> None:
        """Another agent takes the name of this one; its blocks belong to nobody then."""
        self._keeper.recorded([taken], taken.name)
        tags = self._index.checkpoints.get(taken, {})
        change.removed_agents.add(taken)
        change.removed_checkpoints |= {tag.id for tag in tags.values()}
        change.documents |= dict.fromkeys(agent_documents(taken.tenant, taken.name, tags))

    def snapshot(self, ids: Sequence[AgentId], name: str) -> tuple[Snapshot, dict[tuple[str, str], bytes]]:
        """An agent's rows, and its documents by kind and tag. Raises AgentNotFound and StoreError."""
        snapshot = self._view.snapshot(self._keeper.recorded(ids, name))
        tenant = snapshot.agent.id.tenant
        places = {(kind, ""): DocumentId(tenant, kind, name) for kind in FORKED_KINDS}
        for checkpoint in snapshot.checkpoints:
            tag = checkpoint.id.tag
            places[CHECKPOINT_KIND, tag] = checkpoint_document(tenant, name, tag)
        bodies = {place: self._read_document(document) for place, document in places.items()}
        return snapshot, {place: body for place, body in bodies.items() if body is not None}

    def refuse_taken(self, tenant: str, name: str) -> None:
        """Raise AgentExists when the tenant has an agent of that name, of whatever model."""
        if any((one.tenant, one.name) == (tenant, name) for one in self._view.agent_ids()):
            raise AgentExists(f"an agent is named {name!r}; choose another name", param="name")

    def _tagged(self, id: AgentId, tag: str) -> CheckpointRow:
        row = self._index.checkpoints.get(id, {}).get(tag)
        if row is None:
            raise CheckpointNotFound(
                f"agent {id.name!r} has no checkpoint {tag!r}; "
                f"`dormouse agents checkpoints {id.name}` lists those there are",
                param="checkpoint",
            )
        return row

    def _documents(self, source: AgentId, target: str, tag: str | None) -> dict[DocumentId, bytes]:
        """The documents of a fork."""
        bodies = {}
        for kind in FORKED_KINDS:
            origin = DocumentId(source.tenant, kind, source.name)
            if kind == TRANSCRIPT and tag is not None:
                origin = checkpoint_document(source.tenant, source.name, tag)
            body = self._read_document(origin)
            if body is not None:
                bodies[DocumentId(source.tenant, kind, target)] = body
        return bodies

    def _commit_agent(self, row: AgentRow, change: Change, bodies: Mapping[DocumentId, bytes]) -> Agent:
        change.agents[row.id] = row
        release_tails(self._index, change, self._view.unsaved_tips())
        self._commit(change, bodies)
        agent = self._view.agent(row.id)
        assert agent is not None, "it was committed just now"
        return agent

    def _commit(self, change: Change, bodies: Mapping[DocumentId, bytes]) -> None:
        self._notes.documents.check_room({one: len(body) for one, body in bodies.items()})
        nbytes = sum(map(len, bodies.values()))
        if nbytes:
            self._keeper.enforce_quota(2 * (nbytes + CATALOG_ROOM_NBYTES))
        now = self._clock()
        change.documents |= {one: DocumentRow(body, now, now) for one, body in bodies.items()}
        self._keeper.commit(change)
