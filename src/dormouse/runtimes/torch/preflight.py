"""Whether a model folder can be loaded, found out from its settings and the headers of its weight files."""

from __future__ import annotations

from pathlib import Path

from dormouse.runtimes.torch.config import DecoderConfig
from dormouse.runtimes.torch.runtime import read_config
from dormouse.runtimes.torch.weights import Checkpoint, check_tensors, weight_files


def check_folder(folder: Path) -> DecoderConfig:
    """The model's config, once its tensors are known to be what the decoder reads. No weights are loaded.

    Raises UnsupportedModel and ModelFilesMissing, as loading would.
    """
    config = DecoderConfig.from_hf(read_config(folder))
    check_tensors(config, Checkpoint(weight_files(folder)).shapes)
    return config
