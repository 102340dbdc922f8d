"""Rotary position embedding: the parameters of each variant, as a config.json spells them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

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
