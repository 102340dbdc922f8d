"""How each architecture's GGUF tensors and keys become a Hugging Face model folder's.

Names and conversions are those of llama.cpp's `convert_hf_to_gguf.py`, run backwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dormouse.domain.errors import ModelError, UnsupportedModel
from dormouse.models.gguf_file import GgufFile, GgufTensor
from dormouse.models.gguf_rope import ROPE_FACTORS, rope_config

Config = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Planned:
    """One tensor of the folder to be: where it comes from and what is done to it on the way.

    `row_order` picks source rows (None: as they are); `added` is added to every value.
    """

    name: str
    source: GgufTensor
    row_order: NDArray[np.intp] | None = None
    added: float = 0.0


@dataclass(frozen=True, slots=True)
class Architecture:
    """One row of the table: what the family is called, which tensors a layer has, what is special."""

    model_type: str
    class_name: str
    layer: Mapping[str, str]
    permuted_heads: bool = False
    norm_offset: float = 0.0
    extra: Callable[[GgufFile, Config], Config] = field(default=lambda _file, _config: {})


_LAYER = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
_QKV_BIAS = {f"attn_{x}.bias": f"self_attn.{x}_proj.bias" for x in "qkv"}
_QK_NORM = {f"attn_{x}_norm.weight": f"self_attn.{x}_norm.weight" for x in "qk"}
_GEMMA_NORMS = {
    "post_attention_norm.weight": "post_attention_layernorm.weight",
    "ffn_norm.weight": "pre_feedforward_layernorm.weight",
    "post_ffw_norm.weight": "post_feedforward_layernorm.weight",
}

# llama.cpp has these as constants too: the files do not carry them.
_GEMMA3_PATTERN = 6
_GEMMA3_LOCAL_ROPE = 10000.0
_GEMMA3_27B_LAYERS = 62
_SMOLLM3_NO_ROPE_EVERY = 4


def _gemma3(file: GgufFile, config: Config) -> Config:
    layers, head_dim = config["num_hidden_layers"], config["head_dim"]
    # The 27B alone scales attention by the embedding's share of a head; llama.cpp tells it by its depth.
    is_27b = layers == _GEMMA3_27B_LAYERS
    scalar = config["hidden_size"] // config["num_attention_heads"] if is_27b else head_dim
    pattern = file.integer("gemma3.attention.sliding_window_pattern", _GEMMA3_PATTERN)
    if pattern < 1:
        raise ModelError(f"{file.path}: a sliding window pattern of {pattern} layers; the file is damaged")
    softcap = file.metadata.get("gemma3.final_logit_softcapping")
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": scalar,
        "sliding_window": file.integer("gemma3.attention.sliding_window"),
        "layer_types": [
            "full_attention" if (layer + 1) % pattern == 0 else "sliding_attention" for layer in range(layers)
        ],
        "rope_local_base_freq": file.real("gemma3.rope.freq_base_swa", _GEMMA3_LOCAL_ROPE),
        "final_logit_softcapping": softcap,
        "attn_logit_softcapping": None,
    }


def _smollm3(_file: GgufFile, config: Config) -> Config:
    layers = range(1, config["num_hidden_layers"] + 1)
    return {
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "no_rope_layer_interval": _SMOLLM3_NO_ROPE_EVERY,
        "no_rope_layers": [int(layer % _SMOLLM3_NO_ROPE_EVERY != 0) for layer in layers],
    }


def _plain(**extra: Any) -> Callable[[GgufFile, Config], Config]:
    return lambda _file, _config: {"hidden_act": "silu", **extra}


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture(
        "llama", "LlamaForCausalLM", _LAYER, permuted_heads=True,
        extra=_plain(attention_bias=False, mlp_bias=False),
    ),
    "qwen2": Architecture(
        "qwen2", "Qwen2ForCausalLM", {**_LAYER, **_QKV_BIAS}, extra=_plain(use_sliding_window=False)
    ),
    "qwen3": Architecture(
        "qwen3", "Qwen3ForCausalLM", {**_LAYER, **_QK_NORM},
        extra=_plain(attention_bias=False, use_sliding_window=False),
    ),
    "gemma3": Architecture(
        "gemma3_text", "Gemma3ForCausalLM", {**_LAYER, **_QK_NORM, **_GEMMA_NORMS},
        norm_offset=-1.0, extra=_gemma3,
    ),
    "smollm3": Architecture("smollm3", "SmolLM3ForCausalLM", _LAYER, permuted_heads=True, extra=_smollm3),
}  # fmt: skip


def architecture_of(file: GgufFile) -> Architecture:
    """The table's row for `file`. Raises UnsupportedModel naming what cannot be imported."""
    name = file.text("general.architecture")
    if name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise UnsupportedModel(f"{file.path} has architecture {name}; {known} can be imported")
    if file.integer(f"{name}.expert_count", 0):
        raise UnsupportedModel(
            f"{file.path} is a mixture of experts ({name}); only dense models can be imported"
        )
    if (parts := file.integer("split.count", 1)) > 1:
        raise UnsupportedModel(
            f"{file.path} is one of {parts} parts; merge them first (llama-gguf-split --merge) "
            "and import the whole"
        )
    return ARCHITECTURES[name]


def model_config(file: GgufFile, architecture: Architecture) -> Config:
    """`config.json` of the folder, without token ids. Raises ModelError when a key lacks or is absurd."""
    prefix = file.text("general.architecture")
    hidden = _positive(file, f"{prefix}.embedding_length")
    heads = _positive(file, f"{prefix}.attention.head_count")
    head_dim = _head_dim(file, prefix, hidden // heads)
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise ModelError(f"{file.path} lacks the tensor token_embd.weight; convert or download it again")
    config: Config = {
        "architectures": [architecture.class_name],
        "model_type": architecture.model_type,
        "dtype": "bfloat16",
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "intermediate_size": _positive(file, f"{prefix}.feed_forward_length"),
        "num_hidden_layers": _num_layers(file, prefix),
        "num_attention_heads": heads,
        "num_key_value_heads": file.integer(f"{prefix}.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": _positive(file, f"{prefix}.context_length"),
        "rms_norm_eps": _short(file.real(f"{prefix}.attention.layer_norm_rms_epsilon")),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        **rope_config(file, prefix, head_dim),
    }
    return config | architecture.extra(file, config)


def planned_tensors(file: GgufFile, architecture: Architecture, config: Config) -> Iterator[Planned]:
    """Every tensor of the folder, in the model's order.

    Raises ModelError when one lacks or has another shape than the config says, UnsupportedModel when
    the file holds one that the architecture has no place for.
    """
    left = dict(file.tensors)
    left.pop(ROPE_FACTORS, None)
    shapes = _Shapes(config)
    for source_name, name in _names(config, architecture, tied=config["tie_word_embeddings"]):
        source = left.pop(source_name, None)
        if source is None:
            raise ModelError(f"{file.path} lacks the tensor {source_name}; convert or download it again")
        if (wanted := shapes.of(name)) != source.shape:
            raise ModelError(f"{file.path}: {source_name} has shape {list(source.shape)}, not {list(wanted)}")
        yield _planned(name, source, architecture, config)
    if left:
        raise UnsupportedModel(
            f"{file.path} has {len(left)} tensors that {config['model_type']} has no place for, "
            f"such as {min(left)}"
        )


def unpermuted_rows(num_rows: int, num_heads: int) -> NDArray[np.intp]:
    """Which stored row is which row of the original: llama.cpp interleaves the two halves of each head."""
    stored = np.arange(num_rows, dtype=np.intp).reshape(num_heads, num_rows // num_heads // 2, 2)
    return stored.swapaxes(1, 2).reshape(-1)


def _planned(name: str, source: GgufTensor, architecture: Architecture, config: Config) -> Planned:
    if name.endswith("norm.weight"):
        return Planned(name, source, added=architecture.norm_offset)
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    part = name.split(".")[-2]
    if architecture.permuted_heads and part in heads:
        return Planned(name, source, row_order=unpermuted_rows(source.shape[0], heads[part]))
    return Planned(name, source)


def _names(config: Config, architecture: Architecture, *, tied: bool) -> Iterator[tuple[str, str]]:
    yield "token_embd.weight", "model.embed_tokens.weight"
    for layer in range(config["num_hidden_layers"]):
        for source, name in architecture.layer.items():
            yield f"blk.{layer}.{source}", f"model.layers.{layer}.{name}"
    yield "output_norm.weight", "model.norm.weight"
    if not tied:
        yield "output.weight", "lm_head.weight"


class _Shapes:
    """The shape that each tensor must have by the config."""

    def __init__(self, config: Config) -> None:
        hidden, inner = config["hidden_size"], config["intermediate_size"]
        head_dim = config["head_dim"]
        q, kv = (config[f"num_{which}_heads"] * head_dim for which in ("attention", "key_value"))
        self._hidden, self._vocab = hidden, config["vocab_size"]
        self._by_part = {
            "q_proj.weight": (q, hidden),
            "k_proj.weight": (kv, hidden),
            "v_proj.weight": (kv, hidden),
            "o_proj.weight": (hidden, q),
            "q_proj.bias": (q,),
            "k_proj.bias": (kv,),
            "v_proj.bias": (kv,),
            "q_norm.weight": (head_dim,),
            "k_norm.weight": (head_dim,),
            "gate_proj.weight": (inner, hidden),
            "up_proj.weight": (inner, hidden),
            "down_proj.weight": (hidden, inner),
            "embed_tokens.weight": (self._vocab, hidden),
            "lm_head.weight": (self._vocab, hidden),
        }

    def of(self, name: str) -> tuple[int, ...]:
        """Whatever is not in the table is a norm over the hidden dimension."""
        return self._by_part.get(".".join(name.split(".")[-2:]), (self._hidden,))


def _head_dim(file: GgufFile, prefix: str, default: int) -> int:
    head_dim = file.integer(f"{prefix}.attention.key_length", default)
    v_head_dim = file.integer(f"{prefix}.attention.value_length", head_dim)
    rotary = file.integer(f"{prefix}.rope.dimension_count", head_dim)
    if head_dim < 2 or head_dim % 2:
        raise ModelError(f"{file.path}: a head size of {head_dim}; the file is damaged")
    if v_head_dim != head_dim or rotary != head_dim:
        raise UnsupportedModel(
            f"{file.path} has head sizes {head_dim} and {v_head_dim} of which {rotary} rotate; "
            "only equal and fully rotated heads can be imported"
        )
    return head_dim


def _num_layers(file: GgufFile, prefix: str) -> int:
    """Held against the tensors before anything is made for each layer."""
    layers = _positive(file, f"{prefix}.block_count")
    if layers > len(file.tensors):
        raise ModelError(
            f"{file.path}: {layers} layers with {len(file.tensors)} tensors; the file is damaged"
        )
    return layers


def _positive(file: GgufFile, key: str) -> int:
    value = file.integer(key)
    if value < 1:
        raise ModelError(f"{file.path}: {key} is {value}; the file is damaged")
    return value


def _short(value: float) -> float:
    """A float32 as the decimal it was written from: 1e-05, not 9.999999747378752e-06. Infinity for what is
    none; the decoder refuses that."""
    with np.errstate(over="ignore"):
        return float(str(np.float32(value)))
