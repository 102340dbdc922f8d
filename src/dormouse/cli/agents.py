"""`dormouse agents ls|show|rm`: over HTTP while a server owns the data folder, else in the folder itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any
from urllib.parse import quote

import httpx
import typer

from dormouse.api.agent_rows import render_agent
from dormouse.cli.options import Json, key_header, with_settings
from dormouse.cli.output import console, emit_json, friendly_errors, table
from dormouse.domain.agents import DEFAULT_TENANT
from dormouse.domain.errors import AgentNotFound, StoreLocked
from dormouse.settings import Settings
from dormouse.store.block_store import BlockStore

app = typer.Typer(help="List, show and remove agents.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="The agent's name.")]
_FLAGS = ("data_dir", "host", "port", "api_key")
_COLUMNS = ("id", "model", "state", "tokens", "durable_tokens", "pinned", "used_at")
_TIMEOUT_S = 60.0


@app.command("ls")
@with_settings(*_FLAGS)
def list_agents(settings: Settings, json: Json = False) -> None:
    """All agents, the last used first.

    Example: dormouse agents ls
    """
    with friendly_errors(), _source(settings) as source:
        rows = source.list()
    if json:
        emit_json(rows)
    else:
        table([{name: row[name] for name in _COLUMNS} for row in rows], "No agents yet.")


@app.command()
@with_settings(*_FLAGS)
def show(settings: Settings, name: Name, json: Json = False) -> None:
    """One agent.

    Example: dormouse agents show me
    """
    with friendly_errors(), _source(settings) as source:
        row = source.show(name)
    if json:
        emit_json(row)
    else:
        table([{"field": key, "value": value} for key, value in row.items()], "")


@app.command()
@with_settings(*_FLAGS)
def rm(settings: Settings, name: Name) -> None:
    """Forget an agent: its history, and the blocks that only it has.

    What `dormouse chat` remembers of it stays with the chat: `dormouse chat NAME --new` forgets that.

    Example: dormouse agents rm me
    """
    with friendly_errors(), _source(settings) as source:
        source.remove(name)
    console.print(f"Removed {name}.", markup=False, highlight=False)


class _Folder:
    """Agents of a data folder that no server owns."""

    def __init__(self, store: BlockStore) -> None:
        self._store = store

    def list(self) -> list[dict[str, Any]]:
        return [render_agent(agent, "asleep", self._store) for agent in self._store.agents(DEFAULT_TENANT)]

    def show(self, name: str) -> dict[str, Any]:
        return render_agent(self._store.agent(DEFAULT_TENANT, name), "asleep", self._store)

    def remove(self, name: str) -> None:
        self._store.delete_agent(DEFAULT_TENANT, name)


class _Server:
    """Agents of a running server."""

    def __init__(self, client: httpx.Client) -> None:
        self._client = client

    def list(self) -> list[dict[str, Any]]:
        return list(self._call("GET", "")["data"])

    def show(self, name: str) -> dict[str, Any]:
        return self._call("GET", f"/{quote(name, safe='')}")

    def remove(self, name: str) -> None:
        self._call("DELETE", f"/{quote(name, safe='')}")

    def _call(self, method: str, path: str) -> dict[str, Any]:
        answer = self._client.request(method, f"/v1/agents{path}")
        try:
            body: dict[str, Any] = answer.json()
            if answer.is_error:
                raise AgentNotFound(body["error"]["message"])
        except (ValueError, LookupError, TypeError) as error:
            raise StoreLocked(f"what answers at {self._client.base_url} is no Dormouse server") from error
        return body


@contextmanager
def _source(settings: Settings) -> Iterator[_Folder | _Server]:
    try:
        store = BlockStore.open(settings.data_dir, quota_nbytes=settings.disk_quota_nbytes)
    except StoreLocked as locked:
        url = f"http://{settings.host}:{settings.port}"
        with httpx.Client(base_url=url, headers=key_header(settings), timeout=_TIMEOUT_S) as client:
            try:
                yield _Server(client)
            except httpx.TransportError as error:
                hint = f"{locked}; it does not answer at {url} ({error}): give its --host and --port"
                raise StoreLocked(hint) from error
    else:
        with store:
            yield _Folder(store)
