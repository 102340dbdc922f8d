"""The `dormouse` command."""

from __future__ import annotations

from typing import Annotated

import typer

import dormouse
from dormouse.cli import agents, bench, keys, models, store
from dormouse.cli.chat import chat
from dormouse.cli.doctor import doctor
from dormouse.cli.output import console
from dormouse.cli.quality import quality
from dormouse.cli.serve import serve

app = typer.Typer(
    name="dormouse",
    help="A local inference server whose agents sleep on disk and wake in milliseconds.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(serve)
app.command()(chat)
app.command()(quality)
app.command()(doctor)
app.add_typer(agents.app, name="agents")
app.add_typer(bench.app, name="bench")
app.add_typer(keys.app, name="keys")
app.add_typer(models.app, name="models")
app.add_typer(store.app, name="store")


def _version(wanted: bool) -> None:
    if wanted:
        console.print(f"dormouse {dormouse.__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """A local inference server whose agents sleep on disk and wake in milliseconds."""
    del version
