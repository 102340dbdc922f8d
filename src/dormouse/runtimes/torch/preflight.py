"""Whether a model folder can be loaded, found out from its settings and the headers of its weight files."""

from __future__ import annotations

from pathlib import Path

from dormouse.domain.errors import UnsupportedModel
from dormouse.runtimes.decoder_config import DecoderConfig
from dormouse.runtimes.model_files import read_config, weight_files
from dormouse.runtimes.torch.weights import Checkpoint, check_tensors


def read_decoder_config(folder: Path) -> DecoderConfig:
    """The model's config. Raises UnsupportedModel and ModelFilesMissing."""
    raw = read_config(folder)
    if raw.get("quantization"):
        raise UnsupportedModel(
            f"the weights of {folder.name} are quantized for MLX, which torch does not read; serve them with "
            "--runtime mlx (on Linux: pip install 'dormouse[mlx]'), or take the model's plain weights"
        )
    return DecoderConfig.from_hf(raw)


def check_folder(folder: Path) -> DecoderConfig:
    """The model's config, once its tensors are known to be what the decoder reads. No weights are loaded.

    Raises UnsupportedModel and ModelFilesMissing, as loading would.
    """
    config = read_decoder_config(folder)
    check_tensors(config, Checkpoint(weight_files(folder)).shapes)
    return config
