"""`dormouse models import|list|swap`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import httpx
import typer

from dormouse.cli.options import Json, key_header, with_settings
from dormouse.cli.output import (
    console,
    emit_json,
    fail,
    friendly_errors,
    human_nbytes,
    progress_bar,
    table,
)
from dormouse.models.gguf_import import import_gguf
from dormouse.models.sources import import_target, list_models
from dormouse.settings import Settings

app = typer.Typer(help="Import, list and swap models.", no_args_is_help=True)

_LOAD_TIMEOUT_S = 600.0
"""Loading a large model from a slow disk takes minutes."""


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


@app.command()
@with_settings("host", "port", "api_key")
def swap(
    settings: Settings,
    name: Annotated[str, typer.Argument(help="A model folder or the name of an imported model.")],
    timeout_s: Annotated[
        float, typer.Option(min=0, help="Seconds in which requests of the present model may finish.")
    ] = 30.0,
    json: Json = False,
) -> None:
    """Have the running server serve another model; its agents sleep until the old one is back.

    Example: dormouse models swap llama-1b
    """
    url = f"http://{settings.host}:{settings.port}"
    body = {"model": name, "timeout_s": timeout_s}
    try:
        answer = httpx.post(
            f"{url}/admin/models/swap",
            json=body,
            headers=key_header(settings),
            timeout=timeout_s + _LOAD_TIMEOUT_S,
        )
        result = answer.json()
        if answer.is_error:
            raise fail(result["error"]["message"])
    except httpx.TransportError as error:
        raise fail(f"nothing answers at {url} ({error}); give the server's --host and --port") from error
    except (ValueError, LookupError, TypeError) as error:
        raise fail(f"what answers at {url} is no Dormouse server") from error
    if json:
        emit_json(result)
        return
    how = "beside the old one" if result["beside"] else "after the old one"
    console.print(
        f"{result['model']} is served after {result['seconds']:.1f} s ({how}); "
        f"{result['cut_requests']} requests did not finish in time.",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
