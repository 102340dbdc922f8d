"""`dormouse keys add|list|revoke`: in the data folder's key file, also while a server runs."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any

import typer

from dormouse.api.keys import Key, KeyFile
from dormouse.cli.options import Json, with_settings
from dormouse.cli.output import console, emit_json, errors, friendly_errors, table
from dormouse.domain.agents import DEFAULT_TENANT
from dormouse.settings import Settings

app = typer.Typer(
    help="Make, list and revoke API keys. A running server takes changes up with its next request.",
    no_args_is_help=True,
)


@app.command()
@with_settings("data_dir")
def add(
    settings: Settings,
    tenant: Annotated[
        str, typer.Option(help="Whose agents and blocks the key sees: letters, digits, dots, - and _.")
    ] = DEFAULT_TENANT,
    admin: Annotated[bool, typer.Option("--admin", help="May administer the server too.")] = False,
    name: Annotated[str | None, typer.Option(help="A note of what the key is for.")] = None,
) -> None:
    """Make a key and print it: the only time that it is shown.

    Example: dormouse keys add --tenant team-a --name laptop
    """
    with friendly_errors():
        file = KeyFile(settings.data_dir)
        is_first = not file.all()
        key = file.add(tenant, is_admin=admin, name=name)
    console.print(key, markup=False, highlight=False, soft_wrap=True)
    errors.print("Keep it now: only a digest of it is stored.", style="dim")
    if is_first:
        errors.print("The server is closed from now on to requests without a key.", style="dim")
    if not admin and is_first:
        errors.print("It is no admin key; `dormouse keys add --admin` makes one.", style="dim")


@app.command("list")
@with_settings("data_dir")
def list_keys(settings: Settings, json: Json = False) -> None:
    """All keys by their ids, revoked ones too, oldest first.

    Example: dormouse keys list
    """
    with friendly_errors():
        rows = [_row(key) for key in KeyFile(settings.data_dir).all()]
    if json:
        emit_json(rows)
    else:
        table(rows, "No keys: everybody on this machine may do everything.")


@app.command()
@with_settings("data_dir")
def revoke(settings: Settings, id: Annotated[str, typer.Argument(help="The key's id.")]) -> None:
    """Make a key invalid, from the next request on.

    Example: dormouse keys revoke 1f2e3d4c
    """
    with friendly_errors():
        file = KeyFile(settings.data_dir)
        key = file.revoke(id)
        is_last = all(other.revoked_at is not None for other in file.all())
    console.print(f"Revoked {key.id} of tenant {key.tenant}.", markup=False, highlight=False)
    if is_last:
        errors.print("That was the last valid key: the server refuses everybody now.", style="dim")


def _row(key: Key) -> dict[str, Any]:
    return {
        "id": key.id,
        "tenant": key.tenant,
        "admin": key.is_admin,
        "name": key.name or "",
        "created_at": _iso(key.created_at),
        "used_at": _iso(key.used_at) or "never",
        "revoked_at": _iso(key.revoked_at),
    }


def _iso(seconds: float | None) -> str:
    return "" if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
