"""Rotary position settings: GGUF keys and the factors tensor, as `config.json` has them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from gguf.quants import dequantize
from numpy.typing import NDArray

from dormouse.domain.errors import ModelError, UnsupportedModel
from dormouse.models.gguf_file import GgufFile

ROPE_FACTORS = "rope_freqs.weight"

_DEFAULT_THETA = 10000.0
# Llama 3.1 and its kin; the file has only what became of them, one factor per frequency.
_LOW, _HIGH = 1.0, 4.0
_ORIGINAL_CONTEXTS = tuple(1 << bits for bits in range(11, 18))


def rope_config(file: GgufFile, prefix: str, head_dim: int) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling`. Raises UnsupportedModel for a scaling that is not known."""
    theta = file.real(f"{prefix}.rope.freq_base", _DEFAULT_THETA)
    if ROPE_FACTORS in file.tensors:
        scaling: dict[str, Any] | None = _llama3_scaling(file, theta, head_dim)
    else:
        scaling = _declared_scaling(file, prefix)
    return {"rope_theta": theta, "rope_scaling": scaling}


def llama3_factors(theta: float, head_dim: int, scaling: dict[str, Any]) -> NDArray[np.float64]:
    """By what each frequency is divided under `scaling`, as llama.cpp stores it."""
    frequencies = theta ** -(np.arange(0, head_dim, 2) / head_dim)
    wavelengths = 2 * math.pi / frequencies
    factor, low, high = (scaling[k] for k in ("factor", "low_freq_factor", "high_freq_factor"))
    original = scaling["original_max_position_embeddings"]
    smooth = (original / wavelengths - low) / (high - low)
    blended = 1 / ((1 - smooth) / factor + smooth)
    return np.where(
        wavelengths < original / high, 1.0, np.where(wavelengths > original / low, factor, blended)
    )


def _llama3_scaling(file: GgufFile, theta: float, head_dim: int) -> dict[str, Any]:
    tensor = file.tensors[ROPE_FACTORS]
    stored = dequantize(np.asarray(file.rows(tensor)), tensor.type).reshape(-1)
    if stored.shape != (head_dim // 2,):
        raise ModelError(f"{file.path}: {ROPE_FACTORS} has {stored.size} values, not {head_dim // 2}")
    for original in _ORIGINAL_CONTEXTS:
        scaling = {
            "rope_type": "llama3",
            "factor": round(float(stored.max()), 4),
            "low_freq_factor": _LOW,
            "high_freq_factor": _HIGH,
            "original_max_position_embeddings": original,
        }
        if np.allclose(llama3_factors(theta, head_dim, scaling), stored, rtol=1e-3):
            return scaling
    raise UnsupportedModel(f"{file.path} scales its rotary frequencies in a way that is not Llama 3's")


def _declared_scaling(file: GgufFile, prefix: str) -> dict[str, Any] | None:
    kind = file.text(f"{prefix}.rope.scaling.type", "none")
    if kind == "none":
        return None
    factor = file.real(f"{prefix}.rope.scaling.factor")
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        original = file.integer(f"{prefix}.rope.scaling.original_context_length")
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    raise UnsupportedModel(
        f"{file.path} scales rotary positions by {kind}; linear, yarn or none can be imported"
    )
