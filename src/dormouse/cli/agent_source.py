"""Where the commands find agents: at the server that owns the data folder, else in the folder itself."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

import httpx

from dormouse.api.agent_rows import render_agent, render_checkpoint
from dormouse.cli.options import key_header
from dormouse.domain.agents import DEFAULT_TENANT, Agent
from dormouse.domain.errors import AgentNotFound, ArchiveInvalid, InvalidRequest, StoreLocked
from dormouse.models.storage import open_store
from dormouse.settings import Settings
from dormouse.store.block_store import BlockStore

TIMEOUT_S = 120.0
_PAGE = 1000
_CHUNK_NBYTES = 1 << 20
_FILE_MODE = 0o600

Row = dict[str, Any]


class AgentSource(Protocol):
    """Agents, as rows of the API. Methods raise what the API answers, with its message."""

    def all(self) -> list[Row]:
        """All, the last used first."""

    def show(self, name: str) -> Row:
        """One."""

    def remove(self, name: str) -> None:
        """Delete one."""

    def change(self, name: str, pinned: bool) -> Row:
        """Pin or unpin."""

    def fork(self, name: str, target: str, checkpoint: str | None) -> Row:
        """A new agent from another."""

    def checkpoint(self, name: str, tag: str) -> Row:
        """Name the present state."""

    def checkpoints(self, name: str) -> list[Row]:
        """All of an agent."""

    def remove_checkpoint(self, name: str, tag: str) -> None:
        """Forget one."""

    def rollback(self, name: str, tag: str) -> Row:
        """Go back to one."""

    def sleep(self, name: str) -> Row:
        """Give its memory back."""

    def wake(self, name: str) -> Row:
        """Have its blocks read."""

    def export(self, name: str, path: Path) -> int:
        """Write its file; the size in bytes."""

    def load(self, path: Path, name: str | None, overwrite: bool) -> Row:
        """Read a file."""


class FolderAgents:
    """Agents of a data folder that no server owns; all of them sleep."""

    def __init__(self, store: BlockStore) -> None:
        self._store = store

    def all(self) -> list[Row]:
        """See `AgentSource`."""
        return [self._row(agent) for agent in self._store.agents(DEFAULT_TENANT)]

    def show(self, name: str) -> Row:
        """See `AgentSource`."""
        return self._row(self._store.agent(DEFAULT_TENANT, name))

    def remove(self, name: str) -> None:
        """See `AgentSource`."""
        self._store.delete_agent(DEFAULT_TENANT, name)

    def change(self, name: str, pinned: bool) -> Row:
        """See `AgentSource`."""
        self._store.admin.configure(DEFAULT_TENANT, name, pinned=pinned)
        return self.show(name)

    def fork(self, name: str, target: str, checkpoint: str | None) -> Row:
        """See `AgentSource`."""
        return self._row(self._store.admin.fork(DEFAULT_TENANT, name, target, tag=checkpoint))

    def checkpoint(self, name: str, tag: str) -> Row:
        """See `AgentSource`."""
        return render_checkpoint(self._store.admin.tag(DEFAULT_TENANT, name, tag))

    def checkpoints(self, name: str) -> list[Row]:
        """See `AgentSource`."""
        return [render_checkpoint(tag) for tag in self._store.admin.tags(DEFAULT_TENANT, name)]

    def remove_checkpoint(self, name: str, tag: str) -> None:
        """See `AgentSource`."""
        self._store.admin.untag(DEFAULT_TENANT, name, tag)

    def rollback(self, name: str, tag: str) -> Row:
        """See `AgentSource`."""
        return self._row(self._store.admin.rollback(DEFAULT_TENANT, name, tag))

    def sleep(self, name: str) -> Row:
        """Nothing to do: no server has it in memory."""
        return self.show(name)

    def wake(self, name: str) -> Row:
        """Nothing to do: there is no server to wake it for. Raises InvalidRequest."""
        raise InvalidRequest(f"no server runs on this data folder; start one, then wake {name!r}")

    def export(self, name: str, path: Path) -> int:
        """See `AgentSource`."""
        return _write(path, iter(self._store.admin.export(DEFAULT_TENANT, name)))

    def load(self, path: Path, name: str | None, overwrite: bool) -> Row:
        """See `AgentSource`. Of whatever model it is: it is found again when that one is served."""
        with path.open("rb") as file:
            nbytes = path.stat().st_size
            agent = self._store.admin.load(file, nbytes, DEFAULT_TENANT, name=name, overwrite=overwrite)
        return self._row(agent)

    def _row(self, agent: Agent) -> Row:
        return render_agent(agent, "asleep", self._store)


class ServerAgents:
    """Agents of a running server."""

    def __init__(self, client: httpx.Client) -> None:
        self._client = client

    def all(self) -> list[Row]:
        """See `AgentSource`."""
        rows: list[Row] = []
        params: dict[str, str | int] = {"limit": _PAGE}
        while True:
            page = self._json(self._client.get("/v1/agents", params=params))
            rows += page["data"]
            if page["next"] is None:
                return rows
            params["after"] = page["next"]

    def show(self, name: str) -> Row:
        """See `AgentSource`."""
        return self._json(self._client.get(_path(name)))

    def remove(self, name: str) -> None:
        """See `AgentSource`."""
        self._json(self._client.delete(_path(name)))

    def change(self, name: str, pinned: bool) -> Row:
        """See `AgentSource`."""
        return self._json(self._client.patch(_path(name), json={"pinned": pinned}))

    def fork(self, name: str, target: str, checkpoint: str | None) -> Row:
        """See `AgentSource`."""
        return self._post(name, "fork", {"name": target, "checkpoint": checkpoint})

    def checkpoint(self, name: str, tag: str) -> Row:
        """See `AgentSource`."""
        return self._post(name, "checkpoints", {"name": tag})

    def checkpoints(self, name: str) -> list[Row]:
        """See `AgentSource`."""
        return list(self._json(self._client.get(f"{_path(name)}/checkpoints"))["data"])

    def remove_checkpoint(self, name: str, tag: str) -> None:
        """See `AgentSource`."""
        self._json(self._client.delete(f"{_path(name)}/checkpoints/{quote(tag, safe='')}"))

    def rollback(self, name: str, tag: str) -> Row:
        """See `AgentSource`."""
        return self._post(name, "rollback", {"checkpoint": tag})

    def sleep(self, name: str) -> Row:
        """See `AgentSource`."""
        return self._post(name, "sleep")

    def wake(self, name: str) -> Row:
        """See `AgentSource`."""
        return self._post(name, "wake")

    def export(self, name: str, path: Path) -> int:
        """See `AgentSource`."""
        with self._client.stream("GET", f"{_path(name)}/export") as answer:
            if answer.is_error:
                answer.read()
                self._json(answer)
            return _write(path, answer.iter_bytes())

    def load(self, path: Path, name: str | None, overwrite: bool) -> Row:
        """See `AgentSource`."""
        params = {"overwrite": str(overwrite).lower()} | ({"name": name} if name is not None else {})
        headers = {"content-length": str(path.stat().st_size)}
        with path.open("rb") as file:
            body = iter(lambda: file.read(_CHUNK_NBYTES), b"")
            return self._json(
                self._client.post("/v1/agents/import", params=params, content=body, headers=headers)
            )

    def _post(self, name: str, action: str, body: Row | None = None) -> Row:
        return self._json(self._client.post(f"{_path(name)}/{action}", json=body))

    def _json(self, answer: httpx.Response) -> Row:
        try:
            body: Row = answer.json()
            if answer.is_error:
                raise AgentNotFound(body["error"]["message"])
        except (ValueError, LookupError, TypeError) as error:
            raise StoreLocked(f"what answers at {self._client.base_url} is no Dormouse server") from error
        return body


@contextmanager
def agent_source(settings: Settings) -> Iterator[AgentSource]:
    """The agents of `settings.data_dir`, wherever they can be reached. Raises StoreError."""
    try:
        store = open_store(settings)
    except StoreLocked as locked:
        url = f"http://{settings.host}:{settings.port}"
        with httpx.Client(base_url=url, headers=key_header(settings), timeout=TIMEOUT_S) as client:
            try:
                yield ServerAgents(client)
            except httpx.TransportError as error:
                hint = f"{locked}; it does not answer at {url} ({error}): give its --host and --port"
                raise StoreLocked(hint) from error
    else:
        with store:
            yield FolderAgents(store)


def _path(name: str) -> str:
    return f"/v1/agents/{quote(name, safe='')}"


def _write(path: Path, parts: Iterator[bytes]) -> int:
    """Write a file that was not there, or none at all; its size in bytes. It holds a conversation: it is for
    its owner only."""
    try:
        file = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, _FILE_MODE), "wb")
    except OSError as error:
        raise ArchiveInvalid(f"{path} cannot be written: {error}") from error
    try:
        with file:
            return sum(file.write(part) for part in parts)
    except BaseException:
        path.unlink()
        raise
