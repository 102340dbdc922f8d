"""`dormouse bench prefill|decode|edit|wake`."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from dormouse.bench.edit import edit as measure_edit
from dormouse.bench.machine import describe
from dormouse.bench.speed import decode as measure_decode
from dormouse.bench.speed import prefill as measure_prefill
from dormouse.bench.wake import wake as measure_wake
from dormouse.cli.options import Json, with_settings
from dormouse.cli.output import console, emit_json, errors, friendly_errors
from dormouse.engine.engine import Engine
from dormouse.models.runtimes import runtime_name
from dormouse.models.stack import Stack
from dormouse.settings import Settings

app = typer.Typer(help="Measure this machine with this model.", no_args_is_help=True)

_SHARED = (
    "model",
    "models_dir",
    "kv_format",
    "block_size",
    "arena_tokens",
    "runtime",
    "threads",
    "device",
    "dtype",
    "weights",
)
Repeat = Annotated[int, typer.Option(help="Measurements; medians are reported.", min=1)]


@app.command()
@with_settings(*_SHARED, "step_tokens")
def prefill(
    settings: Settings,
    tokens: Annotated[int, typer.Option(help="Length of the prompt.", min=1)] = 4096,
    repeat: Repeat = 5,
    json: Json = False,
) -> None:
    """Speed of reading a new prompt.

    Example: dormouse bench prefill --tokens 4096 --json
    """
    _report("prefill", settings, _with_engine(settings, lambda e: measure_prefill(e, tokens, repeat)), json)


@app.command()
@with_settings(*_SHARED)
def decode(
    settings: Settings,
    batch: Annotated[str, typer.Option(help="Numbers of streams, separated by commas.")] = "1,8",
    context: Annotated[int, typer.Option(help="Tokens of each prompt.", min=1)] = 64,
    tokens: Annotated[int, typer.Option(help="New tokens of each stream.", min=2)] = 64,
    repeat: Repeat = 5,
    json: Json = False,
) -> None:
    """Speed of writing replies, alone and in batches, without speculation (see `edit`).

    Example: dormouse bench decode --batch 1,8 --context 64 --json
    """
    try:
        batches = [int(part) for part in batch.split(",")]
        if not all(1 <= number <= settings.max_running for number in batches):
            raise ValueError("a batch is out of range")
    except ValueError as error:
        raise typer.BadParameter(
            f"--batch takes numbers from 1 to {settings.max_running}, such as 1,8"
        ) from error
    # Prompts of random tokens make a small model go in circles, which are too easily guessed.
    plain = settings.model_copy(update={"speculation": "off"})
    work = lambda e: measure_decode(e, batches, context, tokens, repeat)  # noqa: E731
    _report("decode", settings, _with_engine(plain, work), json)


@app.command()
@with_settings(*_SHARED)
def wake(
    settings: Settings,
    context: Annotated[int, typer.Option(help="Tokens of the agent.", min=1)] = 4096,
    repeat: Repeat = 5,
    json: Json = False,
) -> None:
    """Time to first token of an agent: cold, and after a restart in a fresh process.

    Example: dormouse bench wake --context 4096 --json
    """
    with friendly_errors():
        _report("wake", settings, measure_wake(settings, context, repeat), json)


@app.command()
@with_settings(*_SHARED)
def edit(
    settings: Settings,
    tokens: Annotated[int, typer.Option(help="New tokens of each reply.", min=2)] = 400,
    repeat: Repeat = 5,
    json: Json = False,
) -> None:
    """What speculation gains: a file is given back with a change, and a story that quotes nothing.

    Example: dormouse bench edit --tokens 400 --json
    """
    _report("edit", settings, _with_stack(settings, lambda stack: measure_edit(stack, tokens, repeat)), json)


def _with_engine(settings: Settings, work: Callable[[Engine], dict[str, Any]]) -> dict[str, Any]:
    return _with_stack(settings, lambda stack: work(stack.served.engine))


def _with_stack(settings: Settings, work: Callable[[Stack], dict[str, Any]]) -> dict[str, Any]:
    """Run `work` on a stack over an empty store, which is deleted afterwards."""
    with friendly_errors(), tempfile.TemporaryDirectory(prefix="dormouse-bench-") as folder:
        fresh = settings.model_copy(update={"data_dir": Path(folder), "encryption": "off"})
        with Stack.open(fresh) as stack:
            return work(stack)


def _report(name: str, settings: Settings, result: dict[str, Any], json: bool) -> None:
    document = {"bench": name, "runtime": runtime_name(settings), **result, "machine": describe()}
    if json:
        emit_json(document)
        return
    for key, value in document.items():
        console.print(f"{key}: {value}", highlight=False, soft_wrap=True, markup=False)
    errors.print("Machines are noisy: compare only what ran side by side.", style="dim")
