"""One decoder, many configs: what a Hugging Face `config.json` asks of the decoder, or why it cannot be had.

Every difference between model families is a field of `DecoderConfig`; nothing later looks at a name. Both
spellings of the rotary embedding are read: `rope_parameters` (transformers 5, flat or per layer type) and
`rope_theta` with `rope_scaling` (before).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from dormouse.domain.errors import UnsupportedModel
from dormouse.runtimes.rope import Rope, parse_rope

Raw = Mapping[str, Any]

_MOST_LAYERS = 1024
_LARGEST = 1 << 40
"""Of any size: far beyond every model, and far below where arithmetic becomes slow."""

FULL = "full_attention"
SLIDING = "sliding_attention"

_LLAMA: Raw = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "max_position_embeddings": 2048,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}
_QWEN: Raw = {
    **_LLAMA,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_GEMMA3: Raw = {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
    "attention_bias": False,
    "mlp_bias": False,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "sliding_window_pattern": 6,
    "tie_word_embeddings": True,
}

FAMILY_DEFAULTS: Mapping[str, Raw] = {
    "llama": _LLAMA,
    "mistral": {**_LLAMA, "max_position_embeddings": 131_072, "sliding_window": 4096},
    "smollm3": {
        **_LLAMA,
        "max_position_embeddings": 32768,
        "rope_theta": 2_000_000.0,
        "use_sliding_window": False,
        "sliding_window": None,
        "no_rope_layer_interval": 4,
        "tie_word_embeddings": True,
    },
    "qwen2": _QWEN,
    "qwen3": {**_QWEN, "head_dim": 128},
    "gemma3_text": _GEMMA3,
}
"""What a config may leave out, as transformers 5 fills it in (`configuration_*.py` of each family)."""

_MUST_BE_OFF = (
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "use_bidirectional_attention",
    "rope_interleaved",
    "num_experts",
    "num_local_experts",
    "quantization_config",
    "clip_qkv",
)
"""Keys that change what is computed and that the decoder does not have; null, 0 and false are fine."""

_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


@dataclass(frozen=True, slots=True)
class LayerConfig:
    """`window`: a token sees itself and the `window - 1` before it, None sees all. `rope` None: NoPE."""

    window: int | None
    rope: Rope | None


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """All that the decoder computes differently from one model to the next. Sizes in elements.

    `activation` is `silu` or `gelu_tanh`. `qk_norm`: RMS norm of every q and k head before rope.
    `norms_less_one`: norm weights are stored as w - 1 (Gemma). `sandwich_norms`: the outputs of attention and
    MLP are normed too. `attention_scale` multiplies q·k.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    context_length: int
    norm_eps: float
    activation: str
    tied_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    norms_less_one: bool
    sandwich_norms: bool
    embedding_scale: float
    attention_scale: float
    layers: tuple[LayerConfig, ...]

    @classmethod
    def from_hf(cls, raw: Raw) -> DecoderConfig:
        """Parse the dict of a `config.json`. Raises UnsupportedModel, naming what is missing."""
        try:
            return cls._parse(_with_defaults(raw))
        except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
            # A stranger's file may have anything in place of a number.
            raise UnsupportedModel(f"config.json cannot be used: {error}") from error

    @classmethod
    def _parse(cls, raw: Raw) -> DecoderConfig:
        family = raw["model_type"]
        gemma = family == "gemma3_text"
        _refuse_unsupported(raw)
        num_heads = _positive(raw, "num_attention_heads")
        hidden_size = _positive(raw, "hidden_size")
        num_kv_heads = raw.get("num_key_value_heads") or num_heads
        head_dim = raw.get("head_dim") or hidden_size // num_heads
        if num_heads % num_kv_heads:
            raise UnsupportedModel(f"{num_heads} heads cannot share {num_kv_heads} KV heads evenly")
        if head_dim % 2:
            raise UnsupportedModel(f"head size {head_dim} is odd; rotary embedding needs pairs")
        for name, value in (("num_key_value_heads", num_kv_heads), ("head_dim", head_dim)):
            _positive({name: value}, name)
        attention_bias = bool(raw["attention_bias"])
        return cls(
            architecture=family,
            vocab_size=_positive(raw, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=_positive(raw, "intermediate_size"),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            context_length=_positive(raw, "max_position_embeddings"),
            norm_eps=_finite(raw["rms_norm_eps"], "rms_norm_eps"),
            activation=_activation(raw),
            tied_embeddings=bool(raw["tie_word_embeddings"]),
            qkv_bias=attention_bias or family == "qwen2",
            o_bias=attention_bias and family != "qwen2",
            mlp_bias=bool(raw["mlp_bias"]),
            qk_norm=gemma or family == "qwen3",
            norms_less_one=gemma,
            sandwich_norms=gemma,
            embedding_scale=hidden_size**0.5 if gemma else 1.0,
            attention_scale=_finite(raw["query_pre_attn_scalar"] if gemma else head_dim, "head_dim") ** -0.5,
            layers=_layers(raw),
        )

    def canonical(self) -> str:
        """Text that is equal for two configs exactly when the decoder computes the same."""
        return json.dumps(asdict(self), sort_keys=True)


def _with_defaults(raw: Raw) -> dict[str, Any]:
    """The text model's config with its family's defaults; of `gemma3`, the text part."""
    family = str(raw.get("model_type"))
    if family == "gemma3":
        text = raw.get("text_config") or {}
        tied = raw.get("tie_word_embeddings", text.get("tie_word_embeddings", True))
        raw = {**text, "model_type": "gemma3_text", "tie_word_embeddings": tied}
        family = "gemma3_text"
    if family not in FAMILY_DEFAULTS:
        raise UnsupportedModel(
            f"model_type {family!r} is not supported; supported are {', '.join(FAMILY_DEFAULTS)} and gemma3"
        )
    # A null stands for the default, except that a null window means none.
    given = {key: value for key, value in raw.items() if value is not None or key == "sliding_window"}
    return {**FAMILY_DEFAULTS[family], **given}


def _refuse_unsupported(raw: Raw) -> None:
    for key in _MUST_BE_OFF:
        if raw.get(key):
            raise UnsupportedModel(f"{key}={raw[key]!r} is not supported")
    partial = raw.get("partial_rotary_factor")
    if partial not in (None, 1, 1.0):
        raise UnsupportedModel(f"partial_rotary_factor={partial} is not supported, only whole heads are")


def _positive(raw: Raw, key: str) -> int:
    value = raw.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= _LARGEST:
        raise UnsupportedModel(f"config.json: {key} is {value!r}, it must be an integer from 1 to {_LARGEST}")
    return value


def _finite(value: Any, key: str) -> float:
    number = float(value)
    if not 0 <= number < math.inf:
        raise UnsupportedModel(f"config.json: {key} is {value!r}, it must be a number from 0 on")
    return number


def _activation(raw: Raw) -> str:
    name = raw.get("hidden_activation") or raw.get("hidden_act")
    if name not in _ACTIVATIONS:
        raise UnsupportedModel(f"activation {name!r} is not supported; supported are {list(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def _layers(raw: Raw) -> tuple[LayerConfig, ...]:
    ropes = {kind: parse_rope(raw, kind) for kind in (FULL, SLIDING)}
    has_rope = _has_rope(raw)
    kinds = _layer_types(raw, has_rope)
    window = raw.get("sliding_window")
    if SLIDING in kinds and not window:
        raise UnsupportedModel("config.json: layers with sliding_attention, but no sliding_window")
    if SLIDING in kinds:
        _positive(raw, "sliding_window")
    return tuple(
        LayerConfig(window if kind == SLIDING else None, ropes[kind] if rope else None)
        for kind, rope in zip(kinds, has_rope, strict=True)
    )


def _has_rope(raw: Raw) -> list[bool]:
    num_layers = _positive(raw, "num_hidden_layers")
    if num_layers > _MOST_LAYERS:
        raise UnsupportedModel(f"config.json: {num_layers} layers are more than {_MOST_LAYERS}")
    if raw["model_type"] != "smollm3":
        return [True] * num_layers
    # `no_rope_layers` holds 1 for a layer that HAS rope.
    flags = raw.get("no_rope_layers")
    if flags is None:
        interval = raw["no_rope_layer_interval"]
        return [(layer + 1) % interval != 0 for layer in range(num_layers)]
    return [bool(flag) for flag in _per_layer(raw, "no_rope_layers")]


def _per_layer(raw: Raw, key: str) -> list[Any]:
    values, num_layers = raw[key], raw["num_hidden_layers"]
    if len(values) < num_layers:
        raise UnsupportedModel(f"config.json: {key} has {len(values)} entries for {num_layers} layers")
    return list(values[:num_layers])


def _layer_types(raw: Raw, has_rope: list[bool]) -> list[str]:
    num_layers = len(has_rope)
    slides = [False] * num_layers
    match raw["model_type"]:
        case "mistral":
            slides = [raw["sliding_window"] is not None] * num_layers
        case "gemma3_text":
            slides = [(layer + 1) % raw["sliding_window_pattern"] != 0 for layer in range(num_layers)]
        case "qwen2" | "qwen3":
            slides = [layer >= raw["max_window_layers"] for layer in range(num_layers)]
        case "smollm3":
            slides = [not rope for rope in has_rope]
    derived = [SLIDING if slide else FULL for slide in slides]
    if raw.get("use_sliding_window") is False:
        return [FULL] * num_layers
    if raw.get("layer_types") is None:
        return derived
    given: list[str] = _per_layer(raw, "layer_types")
    if unknown := set(given) - {FULL, SLIDING}:
        raise UnsupportedModel(f"layer types {sorted(unknown)} are not supported")
    if raw["model_type"] in ("llama", "mistral") and given != derived:
        # transformers ignores `layer_types` here, so what the weights were trained with is unclear.
        raise UnsupportedModel(f"layer_types of a {raw['model_type']} model must all be {derived[0]}")
    return given
