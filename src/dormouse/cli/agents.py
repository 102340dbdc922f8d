"""`dormouse agents`: what can be done to agents, through a running server or without one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dormouse.cli.agent_source import agent_source
from dormouse.cli.options import Json, with_settings
from dormouse.cli.output import console, emit_json, friendly_errors, human_nbytes, table
from dormouse.settings import Settings

app = typer.Typer(help="List, show, fork, tag, move and remove agents.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="The agent's name.")]
Tag = Annotated[str, typer.Argument(help="The checkpoint's name.")]
_FLAGS = ("data_dir", "encryption", "encryption_key_file", "host", "port", "api_key")
_COLUMNS = ("id", "model", "state", "tokens", "durable_tokens", "pinned", "used_at")


@app.command("ls")
@with_settings(*_FLAGS)
def list_agents(settings: Settings, json: Json = False) -> None:
    """All agents, the last used first.

    Example: dormouse agents ls
    """
    with friendly_errors(), agent_source(settings) as source:
        rows = source.all()
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
    with friendly_errors(), agent_source(settings) as source:
        row = source.show(name)
    if json:
        emit_json(row)
    else:
        table([{"field": key, "value": value} for key, value in row.items()], "")


@app.command()
@with_settings(*_FLAGS)
def fork(
    settings: Settings,
    name: Name,
    new: Annotated[str, typer.Argument(help="The new agent's name.")],
    at: Annotated[str | None, typer.Option("--at", help="A checkpoint to start from.")] = None,
) -> None:
    """A new agent that continues from where another is. Nothing is copied: both share their blocks.

    Example: dormouse agents fork me me-again --at before
    """
    with friendly_errors(), agent_source(settings) as source:
        row = source.fork(name, new, at)
    _say(f"{new} continues from {row['forked_from']}.")


@app.command()
@with_settings(*_FLAGS)
def checkpoint(settings: Settings, name: Name, tag: Tag) -> None:
    """Give an agent's present state a name, to come back to.

    Example: dormouse agents checkpoint me before
    """
    with friendly_errors(), agent_source(settings) as source:
        row = source.checkpoint(name, tag)
    _say(f"{tag} is {name} after {row['tokens']} tokens.")


@app.command()
@with_settings(*_FLAGS)
def checkpoints(
    settings: Settings,
    name: Name,
    rm: Annotated[str | None, typer.Option("--rm", help="Delete this one first.")] = None,
    json: Json = False,
) -> None:
    """An agent's checkpoints, the oldest first.

    Example: dormouse agents checkpoints me
    """
    with friendly_errors(), agent_source(settings) as source:
        if rm is not None:
            source.remove_checkpoint(name, rm)
        rows = source.checkpoints(name)
    if json:
        emit_json(rows)
    else:
        columns = ("name", "tokens", "created_at")
        table([{column: row[column] for column in columns} for row in rows], "No checkpoints.")


@app.command()
@with_settings(*_FLAGS)
def rollback(settings: Settings, name: Name, tag: Tag) -> None:
    """Put an agent back to a checkpoint. What it said since is gone, unless a fork or checkpoint has it.

    Example: dormouse agents rollback me before
    """
    with friendly_errors(), agent_source(settings) as source:
        row = source.rollback(name, tag)
    _say(f"{name} is where it was after {row['tokens']} tokens.")


@app.command()
@with_settings(*_FLAGS)
def sleep(settings: Settings, name: Name) -> None:
    """Give an agent's memory back now. It wakes by itself when it is asked.

    Example: dormouse agents sleep me
    """
    with friendly_errors(), agent_source(settings) as source:
        row = source.sleep(name)
    _say(f"{name} is {row['state']}.")


@app.command()
@with_settings(*_FLAGS)
def wake(settings: Settings, name: Name) -> None:
    """An agent will be asked soon: have a running server read its blocks.

    Example: dormouse agents wake me
    """
    with friendly_errors(), agent_source(settings) as source:
        row = source.wake(name)
    _say(f"{row['reading_blocks']} blocks of {name} are being read.")


@app.command()
@with_settings(*_FLAGS)
def pin(settings: Settings, name: Name) -> None:
    """A pinned agent's blocks are the last to go when the disk quota is full.

    Example: dormouse agents pin me
    """
    _pin(settings, name, True)


@app.command()
@with_settings(*_FLAGS)
def unpin(settings: Settings, name: Name) -> None:
    """Undo `pin`.

    Example: dormouse agents unpin me
    """
    _pin(settings, name, False)


@app.command()
@with_settings(*_FLAGS)
def export(
    settings: Settings,
    name: Name,
    file: Annotated[Path, typer.Argument(help="A file that is not there yet.")],
) -> None:
    """Write an agent to one file: history, KV, checkpoints and settings.

    Example: dormouse agents export me me.agent.safetensors
    """
    with friendly_errors(), agent_source(settings) as source:
        nbytes = source.export(name, file)
    _say(f"{file}: {human_nbytes(nbytes)}.")


@app.command("import")
@with_settings(*_FLAGS)
def import_agent(
    settings: Settings,
    file: Annotated[Path, typer.Argument(help="A file that `export` wrote.", exists=True, dir_okay=False)],
    name: Annotated[str | None, typer.Option("--name", help="Another name for it.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an agent of that name.")] = False,
) -> None:
    """Read an agent from a file, also of another machine with the same model. Import what you trust.

    Example: dormouse agents import me.agent.safetensors --name me-too
    """
    with friendly_errors(), agent_source(settings) as source:
        row = source.load(file, name, overwrite)
    _say(f"{row['id']} of model {row['model']}: {row['tokens']} tokens.")


@app.command()
@with_settings(*_FLAGS)
def rm(settings: Settings, name: Name) -> None:
    """Forget an agent: its history, its checkpoints, and the blocks that only it has, which are overwritten.

    Example: dormouse agents rm me
    """
    with friendly_errors(), agent_source(settings) as source:
        source.remove(name)
    _say(f"Removed {name}.")


def _pin(settings: Settings, name: str, pinned: bool) -> None:
    with friendly_errors(), agent_source(settings) as source:
        row: dict[str, Any] = source.change(name, pinned)
    _say(f"{name} is {'pinned' if row['pinned'] else 'not pinned'}.")


def _say(what: str) -> None:
    console.print(what, markup=False, highlight=False)
