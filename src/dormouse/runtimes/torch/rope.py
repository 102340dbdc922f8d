"""Rotary position embedding: the parameters of each variant, and tables of cosines and sines.

The frequency formulas are those of transformers' `modeling_rope_utils.py` (5.x), which tests compare with.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dormouse.domain.errors import UnsupportedModel

_ORIGINAL_CONTEXT = "original_max_position_embeddings"
_PARAMETERS = {
    "default": frozenset[str](),
    "linear": frozenset({"factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", _ORIGINAL_CONTEXT}),
    "yarn": frozenset(
        {
            "factor",
            _ORIGINAL_CONTEXT,
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        }
    ),
}
_TABLE_STEP = 4096


@dataclass(frozen=True, slots=True)
class Rope:
    """One variant with its parameters; those that `type` does not use keep their defaults.

    `type` is `default`, `linear`, `llama3` or `yarn`. `magnitude` multiplies cosines and sines.
    """

    type: str
    theta: float
    factor: float = 1.0
    original_context: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    magnitude: float = 1.0

    @classmethod
    def linear(cls, theta: float, factor: float) -> Rope:
        """Positions divided by `factor`."""
        return cls("linear", theta, factor=factor)

    @classmethod
    def yarn(cls, theta: float, factor: float, original_context: int) -> Rope:
        """YaRN with the paper's constants, to `factor` times the `original_context`, in tokens."""
        magnitude = _yarn_magnitude({}, factor)
        return cls("yarn", theta, factor=factor, original_context=original_context, magnitude=magnitude)

    def frequencies(self, head_dim: int) -> Tensor:
        """Radians per position of each rotated pair, `[head_dim / 2]` fp32."""
        exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).to(torch.float32) / head_dim
        base = 1.0 / (self.theta**exponents)
        match self.type:
            case "linear":
                return base / self.factor
            case "llama3":
                return self._llama3(base)
            case "yarn":
                return self._yarn(head_dim, self.theta**exponents)
        return base

    def _llama3(self, base: Tensor) -> Tensor:
        """Long waves slowed by `factor`, short ones kept, those between interpolated."""
        context, low, high = self.original_context, self.low_freq_factor, self.high_freq_factor
        wavelength = 2 * math.pi / base
        slowed = torch.where(wavelength > context / low, base / self.factor, base)
        smooth = (context / wavelength - low) / (high - low)
        between = (1 - smooth) * slowed / self.factor + smooth * slowed
        is_between = (wavelength >= context / high) & (wavelength <= context / low)
        return torch.where(is_between, between, slowed)

    def _yarn(self, head_dim: int, wavelength: Tensor) -> Tensor:
        """Pairs that turn often extrapolate, pairs that turn seldom interpolate, with a ramp between."""

        def pair_that_turns(times: float) -> float:
            turns = math.log(self.original_context / (times * 2 * math.pi))
            return head_dim * turns / (2 * math.log(self.theta))

        low, high = pair_that_turns(self.beta_fast), pair_that_turns(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        if low == high:
            high += 0.001
        ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
        extrapolated = 1 - ramp
        return 1.0 / (self.factor * wavelength) * (1 - extrapolated) + 1.0 / wavelength * extrapolated


def parse_rope(raw: Mapping[str, Any], layer_type: str) -> Rope:
    """The rope of layers of `layer_type` from a config dict with its family's defaults filled in.

    Raises UnsupportedModel for a variant or a parameter that is not known.
    """
    theta, given = _rope_dict(raw, layer_type)
    kind = given.pop("rope_type", None) or given.pop("type", None) or "default"
    given.pop("type", None)
    if kind not in _PARAMETERS:
        raise UnsupportedModel(f"rope type {kind!r} is not supported; supported are {list(_PARAMETERS)}")
    theta = given.pop("rope_theta", None) or theta
    if given.pop("partial_rotary_factor", 1.0) not in (None, 1.0):
        raise UnsupportedModel("partial_rotary_factor is not supported, only whole heads are")
    if kind == "default":
        return Rope("default", float(theta))
    if unknown := set(given) - _PARAMETERS[kind]:
        raise UnsupportedModel(f"parameters {sorted(unknown)} of rope type {kind!r} are not supported")
    contexts = (raw.get(_ORIGINAL_CONTEXT), given.get(_ORIGINAL_CONTEXT), raw["max_position_embeddings"])
    context = next(value for value in contexts if value)
    factor = given.get("factor") or (raw["max_position_embeddings"] / context if kind == "yarn" else 0)
    if not factor:
        raise UnsupportedModel(f"rope type {kind!r} has no factor in config.json")
    if kind == "llama3" and (lacks := sorted({"low_freq_factor", "high_freq_factor"} - set(given))):
        raise UnsupportedModel(f"rope type 'llama3' has no {' and no '.join(lacks)} in config.json")
    return Rope(
        kind,
        float(theta),
        factor=float(factor),
        original_context=int(context) if _ORIGINAL_CONTEXT in _PARAMETERS[kind] else 0,
        low_freq_factor=float(given.get("low_freq_factor") or 1.0),
        high_freq_factor=float(given.get("high_freq_factor") or 1.0),
        beta_fast=float(given.get("beta_fast") or 32.0),
        beta_slow=float(given.get("beta_slow") or 1.0),
        truncate=bool(given.get("truncate", True)),
        magnitude=_yarn_magnitude(given, factor) if kind == "yarn" else 1.0,
    )


def _rope_dict(raw: Mapping[str, Any], layer_type: str) -> tuple[float, dict[str, Any]]:
    """The base that applies when the parameters name none, and the parameters of `layer_type`."""
    local_theta = raw.get("rope_local_base_freq")
    theta = local_theta if local_theta and layer_type == "sliding_attention" else raw["rope_theta"]
    given = raw.get("rope_parameters") or {}
    if any(isinstance(value, Mapping) for value in given.values()):
        return theta, dict(given.get(layer_type) or {})
    if not given and not (local_theta and layer_type == "sliding_attention"):
        # Gemma 3 before transformers 5: the scaling is of the global layers only.
        given = raw.get("rope_scaling") or {}
    return theta, dict(given)


def _yarn_magnitude(given: Mapping[str, Any], factor: float) -> float:
    """Attention temperature of YaRN (section 3.4 of the paper; `mscale` is DeepSeek's form of it)."""

    def scale(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    if given.get("attention_factor") is not None:
        return float(given["attention_factor"])
    mscale, mscale_all_dim = given.get("mscale"), given.get("mscale_all_dim")
    if mscale and mscale_all_dim:
        return scale(mscale) / scale(mscale_all_dim)
    return scale(1.0)


@dataclass(frozen=True, slots=True)
class RopeTable:
    """`cos` and `sin` of each rotated pair, fp32 `[positions, head_dim / 2]`."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def build(cls, rope: Rope, head_dim: int, num_positions: int, device: torch.device) -> RopeTable:
        """The table for positions 0 up to at least `num_positions`.

        Angles are fp32 products as in training; their cosines are taken in fp64 and in steps of one fixed
        size, so that an entry does not depend on the table's length.
        """
        frequencies: NDArray[np.float32] = rope.frequencies(head_dim).numpy()
        cos, sin = [], []
        for start in range(0, num_positions, _TABLE_STEP):
            positions = np.arange(start, start + _TABLE_STEP, dtype=np.float32)
            angles = (positions[:, None] * frequencies).astype(np.float64)
            cos.append((np.cos(angles) * rope.magnitude).astype(np.float32))
            sin.append((np.sin(angles) * rope.magnitude).astype(np.float32))
        return cls(*(torch.from_numpy(np.concatenate(parts)).to(device) for parts in (cos, sin)))
