"""Whether mlx can load a model folder, found out without reading its weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dormouse.runtimes.context import Context
from dormouse.runtimes.mlx.config import Meaning
from dormouse.runtimes.mlx.model import load_model
from dormouse.runtimes.mlx.probe import Shape, measure
from dormouse.runtimes.model_files import read_config, weight_files


@dataclass(frozen=True, slots=True)
class Found:
    """What loading would give. Lengths are in tokens; `weights_nbytes` is what the weights take in memory,
    `dense_token_nbytes` what K and V of a token take in the dtype of computing."""

    shape: Shape
    num_layers: int
    trained_length: int
    context_length: int
    weights_nbytes: int
    dense_token_nbytes: int


def check_folder(folder: Path, *, dtype: str | None, context: Context) -> Found:
    """Build the model with weights that stay in their files, and look at it; see `MlxRuntime.load`.

    Raises UnsupportedModel, ModelFilesMissing and ModelError as loading would, but for too little memory.
    """
    raw = read_config(folder)
    meaning = Meaning.of(raw, context)
    loaded = load_model(folder, weight_files(folder), raw, meaning.config, dtype, lazy=True)
    shape, num_layers = measure(loaded), len(loaded.windows)
    dims = shape.num_kv_heads * (shape.k_head_dim + shape.v_head_dim)
    return Found(
        shape=shape,
        num_layers=num_layers,
        trained_length=meaning.config.context_length if meaning.config else meaning.context_length,
        context_length=meaning.context_length,
        weights_nbytes=loaded.nbytes,
        dense_token_nbytes=num_layers * dims * loaded.dtype.size,
    )
