"""`dormouse quality`: the cost of each KV format on a text of your own."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from dormouse.bench.quality import perplexity
from dormouse.cli.options import Json, with_settings
from dormouse.cli.output import emit_json, friendly_errors, progress_bar, table
from dormouse.domain.cache_spec import KVFormat
from dormouse.domain.errors import InvalidRequest
from dormouse.models.chat import ChatModel
from dormouse.models.progress import Progress
from dormouse.models.runtimes import load_runtime
from dormouse.models.sources import resolve
from dormouse.settings import Settings

_SERVED = "bf16,q8,k8v4,q4"


@with_settings(
    "model", "models_dir", "block_size", "runtime", "threads", "device", "dtype", "weights", "step_tokens"
)
def quality(
    settings: Settings,
    text: Annotated[Path, typer.Argument(help="A UTF-8 text file.", exists=True, dir_okay=False)],
    formats: Annotated[str, typer.Option(help="KV formats, separated by commas.")] = _SERVED,
    window: Annotated[int, typer.Option(help="Tokens of context.", min=2)] = 2048,
    limit: Annotated[int, typer.Option(help="Read at most this many tokens.", min=2)] = 16384,
    json: Json = False,
) -> None:
    """Perplexity of a text under each KV format; lower is better.

    Example: dormouse quality README.md --formats bf16,k8v4,q4
    """
    with friendly_errors(), progress_bar() as on_progress:
        chosen = _parse(formats)
        rows = _measure(settings, text, chosen, window, limit, on_progress)
    if json:
        emit_json({"text": text.name, "window": window, "formats": rows})
    else:
        table(rows, "")


def _measure(
    settings: Settings,
    text: Path,
    formats: list[KVFormat],
    window: int,
    limit: int,
    on_progress: Progress,
) -> list[dict[str, Any]]:
    folder = resolve(settings.model, settings.models_dir, on_progress=on_progress)
    try:
        words = text.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{text} is not UTF-8 text: {error.reason}") from error
    tokens = ChatModel.load(folder).encode(words)[:limit]
    if len(tokens) < 2:
        raise InvalidRequest(f"{text} has {len(tokens)} tokens; a longer text is needed")
    rows: list[dict[str, Any]] = []
    for kv_format in formats:
        changed = {"kv_format": kv_format, "arena_tokens": window + settings.block_size}
        runtime = load_runtime(settings.model_copy(update=changed), folder)
        value = perplexity(
            runtime,
            tokens,
            window=min(window, runtime.spec.context_length),
            chunk_tokens=settings.step_tokens,
            on_tokens=partial(on_progress, str(kv_format), total=len(tokens)),
        )
        bytes_per_token = runtime.cache.token_nbytes
        runtime.close()
        first = rows[0]["perplexity"] if rows else value
        rows.append(
            {
                "format": str(kv_format),
                "perplexity": round(value, 4),
                "against_first": f"{100 * (value / first - 1):+.2f}%",
                "bytes_per_token": round(bytes_per_token),
                "tokens": len(tokens),
            }
        )
    return rows


def _parse(formats: str) -> list[KVFormat]:
    try:
        return [KVFormat(name.strip()) for name in formats.split(",")]
    except ValueError as error:
        known = ", ".join(KVFormat)
        raise InvalidRequest(f"--formats: {error}; known are {known}") from error
