"""`dormouse store stats|verify|gc`. The folder must be free: one process owns it at a time."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import typer

from dormouse.cli.options import Json, with_settings
from dormouse.cli.output import console, emit_json, friendly_errors, table
from dormouse.settings import Settings
from dormouse.store.block_store import BlockStore

app = typer.Typer(help="Inspect and repair the data folder, while no server uses it.", no_args_is_help=True)

_FLAGS = ("data_dir", "disk_quota_gb")


@app.command()
@with_settings(*_FLAGS)
def stats(settings: Settings, json: Json = False) -> None:
    """What is stored, in blocks and bytes.

    Example: dormouse store stats --json
    """
    with friendly_errors(), _open(settings) as store:
        _print(dataclasses.asdict(store.stats()), json)


@app.command()
@with_settings(*_FLAGS)
def verify(settings: Settings, json: Json = False) -> None:
    """Derive every checksum and key again. Damaged files are quarantined; exits with 1 if there are any.

    Example: dormouse store verify
    """
    with friendly_errors(), _open(settings) as store:
        report = store.verify()
    found = {
        "num_blocks": report.num_blocks,
        "nbytes": report.nbytes,
        "damaged": [key.hex() for key in report.damaged],
        "broken_agents": [f"{agent.tenant}: {agent.name}" for agent in report.broken_agents],
    }
    _print(found, json)
    if not json and report.is_clean:
        console.print("All of it is as it should be.")
    if not report.is_clean:
        raise typer.Exit(1)


@app.command()
@with_settings(*_FLAGS)
def gc(
    settings: Settings,
    unused_hours: Annotated[float, typer.Option(help="Keep what was used since then.", min=0)] = 24.0,
    json: Json = False,
) -> None:
    """Remove blocks that no agent reaches. Agents and their blocks stay.

    Example: dormouse store gc --unused-hours 0
    """
    with friendly_errors(), _open(settings) as store:
        removed = store.gc(unused_hours * 3600)
        _print({"num_blocks": removed.num_blocks, "nbytes": removed.nbytes}, json)


def _open(settings: Settings) -> BlockStore:
    return BlockStore.open(settings.data_dir, quota_nbytes=settings.disk_quota_nbytes)


def _print(document: dict[str, Any], json: bool) -> None:
    if json:
        emit_json(document)
        return
    table([{"field": key, "value": value} for key, value in document.items()], "")
