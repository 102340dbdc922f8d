"""Toy model folders as MLX's users have them: of any family of mlx-lm, quantized or not."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dormouse.models.folder import ModelFolder, open_folder

QUANTIZATION = {"group_size": 32, "bits": 4}
SHAPE: Mapping[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
}


def save_mlx_toy(
    folder: Path,
    like: ModelFolder,
    family: str,
    *,
    quantization: Mapping[str, int] | None = None,
    changes: Mapping[str, Any] | None = None,
) -> ModelFolder:
    """A model of `family` with random weights and the tokenizer of `like`; `changes` go into its config."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    nn: Any = importlib.import_module("mlx.nn")  # whose stubs name nothing
    folder.mkdir()
    for file in like.path.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, folder)
    config = {**like.config, **SHAPE, "model_type": family, **(changes or {})}
    arch = importlib.import_module(f"mlx_lm.models.{family}")
    mx.random.seed(0)
    model = arch.Model(arch.ModelArgs.from_dict(config))
    if quantization is not None:
        nn.quantize(model, **quantization)
        config |= {"quantization": quantization, "quantization_config": quantization}
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config))
    return open_folder(folder)


def change_config(folder: ModelFolder, **changes: Any) -> ModelFolder:
    """The same folder with another config."""
    (folder.path / "config.json").write_text(json.dumps({**folder.config, **changes}))
    return open_folder(folder.path)
