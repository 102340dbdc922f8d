"""`dormouse models import|list`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dormouse.cli.options import Json, with_settings
from dormouse.cli.output import console, emit_json, friendly_errors, human_nbytes, progress_bar, table
from dormouse.models.gguf_import import import_gguf
from dormouse.models.sources import import_target, list_models
from dormouse.settings import Settings

app = typer.Typer(help="Import and list models.", no_args_is_help=True)


@app.command("import")
@with_settings("models_dir")
def import_model(
    settings: Settings,
    file: Annotated[Path, typer.Argument(help="A GGUF file.", exists=True, dir_okay=False)],
    name: Annotated[str | None, typer.Option(help="Name to serve it by; the file's, if not given.")] = None,
) -> None:
    """Convert a GGUF file into a model folder, once.

    Example: dormouse models import ./Llama-3.2-1B-Instruct-Q8_0.gguf --name llama-1b
    """
    with friendly_errors(), progress_bar() as on_progress:
        target = import_target(name or file.stem, settings.models_dir)
        folder = import_gguf(file, target, on_progress)
    console.print(f"Imported. Serve it with: dormouse serve --model {folder.name}", highlight=False)


@app.command("list")
@with_settings("models_dir")
def list_(settings: Settings, json: Json = False) -> None:
    """The imported models.

    Example: dormouse models list
    """
    rows = [
        {
            "name": folder.name,
            "type": str(folder.config.get("model_type", "?")),
            "weights": folder.weights_nbytes if json else human_nbytes(folder.weights_nbytes),
            "path": str(folder.path),
        }
        for folder in list_models(settings.models_dir)
    ]
    if json:
        emit_json(rows)
    else:
        table(rows, "No models yet; `dormouse serve` fetches smollm2 on its first start.")
