"""What a config.json means, and how mlx-lm is told, so that it computes that."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dormouse.domain.errors import ModelError, UnsupportedModel
from dormouse.runtimes.context import Context
from dormouse.runtimes.decoder_config import FULL, SLIDING, DecoderConfig, LayerConfig
from dormouse.runtimes.rope import Rope

KNOWN_QUANTIZATIONS = ("awq", "bitnet", "compressed-tensors", "fp8", "gptq", "modelopt", "mxfp4", "mxfp8")
"""`quant_method`s that mlx-lm looks at. It reads the weights of any other as if they were none of it."""

_MODES = ("affine", "mxfp4", "mxfp8", "nvfp4")

_QUANTIZATION = ("quantization", "quantization_config")
_VOLATILE = ("_name_or_path", "transformers_version")
"""What a config says of where it comes from."""


@dataclass(frozen=True, slots=True)
class Meaning:
    """What a model computes by its config. `config` is None for a family that only mlx-lm knows.

    `canonical` is a part of the model's fingerprint: of families that every runtime knows the same in each.
    `context_length` is in tokens.
    """

    architecture: str
    canonical: str
    context_length: int
    config: DecoderConfig | None

    @classmethod
    def of(cls, raw: Mapping[str, Any], context: Context) -> Meaning:
        """Raises ModelError for a context that cannot be had, UnsupportedModel for no model_type."""
        family = raw.get("model_type")
        if not isinstance(family, str):
            raise UnsupportedModel("config.json names no model_type")
        plain = {key: value for key, value in raw.items() if key not in _QUANTIZATION}
        quantization = {key: raw[key] for key in _QUANTIZATION if raw.get(key)}
        try:
            known = DecoderConfig.from_hf(plain)
        except UnsupportedModel:  # by the decoder that the other runtime has; mlx-lm may know it
            kept = {key: value for key, value in raw.items() if key not in _VOLATILE}
            return cls(family, json.dumps(kept, sort_keys=True), _context_length(raw, context), None)
        config, length = context.fit(known)
        canonical = config.canonical()
        if quantization:
            canonical += json.dumps(quantization, sort_keys=True)
        return cls(config.architecture, canonical, length, config)


def changes_for(raw: Mapping[str, Any], config: DecoderConfig) -> dict[str, Any]:
    """What to lay over the `config.json` of a model whose meaning is known.

    mlx-lm takes what a config leaves out from defaults of its own, and of some families it does not read the
    spelling of transformers 5 at all. Raises UnsupportedModel for what it has no word for.
    """
    windows = {layer.window for layer in config.layers} - {None}
    changes: dict[str, Any] = {
        "head_dim": config.head_dim,
        "num_key_value_heads": config.num_kv_heads,
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.context_length,
        "tie_word_embeddings": config.tied_embeddings,
        "attention_bias": config.qkv_bias and config.o_bias,
        "mlp_bias": config.mlp_bias,
        "layer_types": [
            "full_attention" if layer.window is None else "sliding_attention" for layer in config.layers
        ],
        "sliding_window": next(iter(windows), None),
        **_rope_changes(config),
        **_pattern(config),
    }
    if "text_config" in raw:
        return {"text_config": {**raw["text_config"], **changes}}
    return changes


def refuse_unknown_quantization(raw: Mapping[str, Any]) -> None:
    """Raise UnsupportedModel for weights that mlx-lm would read as something else."""
    own = raw.get("quantization")
    if isinstance(own, Mapping):
        mode = own.get("mode", "affine")
        if mode not in _MODES:
            raise UnsupportedModel(f"MLX knows no quantization {mode!r}; it has {', '.join(_MODES)}")
        return
    theirs = raw.get("quantization_config") or (raw.get("text_config") or {}).get("quantization_config")
    if not theirs:
        return
    method = theirs.get("quant_method") if isinstance(theirs, Mapping) else None
    if method not in KNOWN_QUANTIZATIONS:
        raise UnsupportedModel(
            f"weights quantized by {method!r} are not known to MLX; take the model's plain weights, or ones "
            "made by mlx_lm.convert"
        )


def _rope_changes(config: DecoderConfig) -> dict[str, Any]:
    """One rope for layers that see all, one for those with a window; more than mlx-lm could be told."""
    ropes = {layer.rope for layer in config.layers if layer.rope is not None and layer.window is None}
    local = {layer.rope for layer in config.layers if layer.rope is not None and layer.window is not None}
    if len(ropes) > 1 or len(local) > 1:
        raise UnsupportedModel("mlx-lm has no words for more than one rope among layers of one kind")
    changes: dict[str, Any] = {}
    for rope in local:
        changes["rope_local_base_freq"] = rope.theta
    for rope in ropes or local:
        scaling = _scaling(rope)
        changes["rope_theta"] = rope.theta
        changes["rope_scaling"] = scaling
        changes["rope_parameters"] = {"rope_theta": rope.theta, **(scaling or {"rope_type": "default"})}
    return changes


def _scaling(rope: Rope) -> dict[str, Any] | None:
    match rope.type:
        case "default":
            return None
        case "linear":
            return {"rope_type": "linear", "factor": rope.factor}
        case "llama3":
            return {
                "rope_type": "llama3",
                "factor": rope.factor,
                "low_freq_factor": rope.low_freq_factor,
                "high_freq_factor": rope.high_freq_factor,
                "original_max_position_embeddings": rope.original_context,
            }
        case "yarn":
            usual = Rope.yarn(rope.theta, rope.factor, rope.original_context)
            if rope.magnitude != usual.magnitude or not rope.truncate:
                raise UnsupportedModel("mlx-lm has YaRN with the paper's magnitude and whole pairs only")
            return {
                "rope_type": "yarn",
                "factor": rope.factor,
                "original_max_position_embeddings": rope.original_context,
                "beta_fast": rope.beta_fast,
                "beta_slow": rope.beta_slow,
            }
    raise UnsupportedModel(f"mlx-lm has no rope of type {rope.type!r}")


def _kind(layer: LayerConfig) -> str:
    return FULL if layer.window is None else SLIDING


def _pattern(config: DecoderConfig) -> dict[str, Any]:
    """Gemma 3: every n-th layer sees all. Whether that is so of each is seen once the model is loaded."""
    full = [index for index, layer in enumerate(config.layers) if layer.window is None]
    return {"sliding_window_pattern": full[0] + 1} if full else {}


def _context_length(raw: Mapping[str, Any], context: Context) -> int:
    """Tokens of context of a family whose rope nobody but mlx-lm can scale. Raises ModelError."""
    text = raw.get("text_config") or {}
    trained = raw.get("max_position_embeddings") or text.get("max_position_embeddings")
    if not isinstance(trained, int) or trained <= 0:
        raise UnsupportedModel("config.json has no max_position_embeddings")
    if context.scaling != "none" or context.factor is not None:
        raise ModelError("--rope-scaling is not supported for this family or quantization under mlx")
    length = context.length or trained
    if length > trained:
        raise ModelError(f"--context-length {length} is beyond the {trained} tokens of the model")
    return length
