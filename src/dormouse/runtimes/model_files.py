"""The files of a model folder that a runtime reads: its config and its weights."""

from __future__ import annotations

import json
from pathlib import Path

from dormouse.domain.errors import ModelFilesMissing, UnsupportedModel

INDEX = "model.safetensors.index.json"


def read_config(folder: Path) -> dict[str, object]:
    """The object in config.json. Raises ModelFilesMissing or UnsupportedModel."""
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_bytes())
    except FileNotFoundError as exc:
        raise ModelFilesMissing(f"{folder} lacks config.json") from exc
    except ValueError as exc:
        raise UnsupportedModel(f"{path} is not JSON: {exc}") from exc
    if not isinstance(raw, dict):
        raise UnsupportedModel(f"{path} holds no object")
    return raw


def weight_files(folder: Path) -> list[Path]:
    """The model's safetensors files in name order.

    Raises ModelFilesMissing, naming what is not there, and UnsupportedModel for an index that is not one.
    """
    index, single = folder / INDEX, folder / "model.safetensors"
    if index.is_file():
        files = [folder / name for name in _indexed_names(index)]
    elif single.is_file():
        files = [single]  # beside it some folders keep the same weights in their maker's own layout
    else:
        files = sorted(folder.glob("*.safetensors"))
    absent = [file.name for file in files if not file.is_file()]
    if absent or not files:
        raise ModelFilesMissing(f"{folder} lacks {', '.join(absent) or 'safetensors weights'}")
    return files


def _indexed_names(index: Path) -> list[str]:
    try:
        names = {str(name) for name in json.loads(index.read_bytes())["weight_map"].values()}
    except (ValueError, LookupError, TypeError, AttributeError) as exc:
        raise UnsupportedModel(f"{index} is not an index of safetensors files") from exc
    if any(Path(name).name != name for name in names):
        raise UnsupportedModel(f"{index} names files outside of its folder")
    return sorted(names)
