"""A model folder: config.json, safetensors and tokenizer.json, as Hugging Face lays them out."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from dormouse.domain.errors import ModelError, ModelFilesMissing

CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
WEIGHTS_INDEX = "model.safetensors.index.json"
MAX_SETTINGS_NBYTES = 1 << 26


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A folder that was found whole. `files` are the weights and settings, by name, sorted."""

    path: Path
    name: str
    config: dict[str, Any] = field(repr=False, hash=False)
    files: tuple[str, ...] = field(repr=False)

    @property
    def weights(self) -> tuple[Path, ...]:
        """The safetensors files."""
        return tuple(self.path / name for name in self.files if name.endswith(".safetensors"))

    @property
    def weights_nbytes(self) -> int:
        """Size of the weights on disk."""
        return sum(path.stat().st_size for path in self.weights)


def open_folder(path: Path, name: str | None = None) -> ModelFolder:
    """The folder at `path`, called `name` (default: the folder's own name).

    Raises ModelFilesMissing listing what lacks, and ModelError when a settings file is not JSON.
    """
    path = path.absolute()
    files = tuple(sorted(entry.name for entry in path.iterdir() if entry.is_file()))
    weights = tuple(file for file in files if file.endswith(".safetensors"))
    missing = [file for file in (CONFIG, TOKENIZER) if file not in files]
    wanted = _indexed_shards(path) if WEIGHTS_INDEX in files else ()
    missing += [shard for shard in wanted if shard not in files]
    if not weights and not wanted:
        missing.append("*.safetensors")
    if missing:
        raise ModelFilesMissing(
            f"{path} lacks {', '.join(missing)}; a model folder has {CONFIG}, {TOKENIZER} and "
            "its weights as safetensors"
        )
    kept = wanted or weights
    settings = tuple(file for file in files if file.endswith((".json", ".jinja")))
    return ModelFolder(path, name or path.name, read_json(path / CONFIG), tuple(sorted({*kept, *settings})))


def read_json(path: Path) -> dict[str, Any]:
    """The object in the file. Raises ModelError when the file is not a JSON object."""
    try:
        if path.stat().st_size > MAX_SETTINGS_NBYTES:
            raise ModelError(f"{path} has more than {MAX_SETTINGS_NBYTES} bytes; it is no file of settings")
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"cannot read {path}: {error}; download or import the model again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} is no JSON object; download or import the model again")
    return value


def _indexed_shards(path: Path) -> tuple[str, ...]:
    weight_map = read_json(path / WEIGHTS_INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{path / WEIGHTS_INDEX} has no weight_map; download or import the model again")
    shards = sorted({str(shard) for shard in weight_map.values()})
    for shard in shards:
        # An index comes from strangers, and its names become paths.
        if PurePath(shard).name != shard or not shard.endswith(".safetensors"):
            raise ModelError(
                f"{path / WEIGHTS_INDEX} names {shard!r}, which is no safetensors file beside it"
            )
    return tuple(shards)
