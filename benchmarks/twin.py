"""A second model to swap with: a copy of one with a few weights changed."""

from __future__ import annotations

import json
from pathlib import Path

from dormouse.models.folder import ModelFolder, open_folder

_NORM = "model.norm.weight"


def make_twin(folder: ModelFolder, target: Path) -> ModelFolder:
    """A copy of `folder` at `target` whose last norm is another: a model of its own, of the same cost.

    Files that stay as they are become symbolic links.
    """
    target.mkdir(parents=True)
    for name in folder.files:
        source = (folder.path / name).resolve()
        if name.endswith(".safetensors"):
            (target / name).write_bytes(_changed(source.read_bytes()))
        else:
            (target / name).symlink_to(source)
    return open_folder(target)


def _changed(weights: bytes) -> bytes:
    """The first values of the last norm with other signs, where this file holds it."""
    header_nbytes = int.from_bytes(weights[:8], "little")
    entry = json.loads(weights[8 : 8 + header_nbytes]).get(_NORM)
    if entry is None:
        return weights
    start = 8 + header_nbytes + entry["data_offsets"][0]
    changed = bytearray(weights)
    changed[start + 1 : start + 32 : 2] = (byte ^ 0x80 for byte in weights[start + 1 : start + 32 : 2])
    return bytes(changed)
