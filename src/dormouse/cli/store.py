"""`dormouse store stats|verify|gc|encrypt|decrypt|forget-tenant`.

The folder must be free: one process owns it at a time.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import typer

from dormouse.cli.options import Json, with_settings
from dormouse.cli.output import console, emit_json, friendly_errors, table
from dormouse.domain.errors import EncryptionMismatch, StoreError
from dormouse.models.storage import key_source, open_store
from dormouse.settings import Settings
from dormouse.store.conversion import Conversion, Converted, destroy_tenant
from dormouse.store.master_key import KeySource

app = typer.Typer(help="Inspect and repair the data folder, while no server uses it.", no_args_is_help=True)

_FLAGS = ("data_dir", "disk_quota_gb", "encryption", "encryption_key_file")


@app.command()
@with_settings(*_FLAGS)
def stats(settings: Settings, json: Json = False) -> None:
    """What is stored, in blocks and bytes.

    Example: dormouse store stats --json
    """
    with friendly_errors(), open_store(settings) as store:
        _print(dataclasses.asdict(store.stats()), json)


@app.command()
@with_settings(*_FLAGS)
def verify(settings: Settings, json: Json = False) -> None:
    """Derive every checksum and key again. Damaged files are quarantined; exits with 1 if there are any.

    Example: dormouse store verify
    """
    with friendly_errors(), open_store(settings) as store:
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
    with friendly_errors(), open_store(settings) as store:
        removed = store.gc(unused_hours * 3600)
        _print({"num_blocks": removed.num_blocks, "nbytes": removed.nbytes}, json)


@app.command()
@with_settings(*_FLAGS)
def encrypt(settings: Settings, json: Json = False) -> None:
    """Encrypt a data folder that is not: all of it is written anew, then what was there is overwritten.

    Example: dormouse store encrypt --encryption file --encryption-key-file ~/keys/dormouse.key
    """
    with friendly_errors():
        _print_converted(_conversion(settings).encrypt(), json)


@app.command()
@with_settings(*_FLAGS)
def decrypt(settings: Settings, json: Json = False) -> None:
    """Make an encrypted data folder plain again; its keys are destroyed at the end.

    Example: dormouse store decrypt --encryption file --encryption-key-file ~/keys/dormouse.key
    """
    with friendly_errors():
        _print_converted(_conversion(settings).decrypt(), json)


@app.command("forget-tenant")
@with_settings(*_FLAGS)
def forget_tenant(
    settings: Settings,
    tenant: Annotated[str, typer.Argument(help="Whose agents, blocks and documents are to go.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Delete all that a tenant has, by destroying its key. For encrypted data folders.

    Example: dormouse store forget-tenant team-a --encryption file
    """
    if not yes:
        typer.confirm(f"Nothing of tenant '{tenant}' can be read ever again. Go on?", abort=True)
    with friendly_errors():
        source = _require_source(settings)
        if not destroy_tenant(settings.data_dir, source, tenant):
            raise StoreError(f"no tenant '{tenant}' has a key in {settings.data_dir}")
        with open_store(settings) as store:  # which removes what cannot be read any more
            left = len(store.agents())
    console.print(f"Destroyed the key of {tenant}; {left} agents of others are here.", markup=False)


def _conversion(settings: Settings) -> Conversion:
    return Conversion(settings.data_dir, _require_source(settings), quota_nbytes=settings.disk_quota_nbytes)


def _require_source(settings: Settings) -> KeySource:
    source = key_source(settings)
    if source is None:
        raise EncryptionMismatch("say where the master key is: --encryption file, or --encryption keyring")
    return source


def _print_converted(done: Converted, json: bool) -> None:
    _print(dataclasses.asdict(done), json)


def _print(document: dict[str, Any], json: bool) -> None:
    if json:
        emit_json(document)
        return
    table([{"field": key, "value": value} for key, value in document.items()], "")
