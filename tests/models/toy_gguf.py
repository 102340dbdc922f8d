"""Toy GGUF files, written as llama.cpp's converter writes them, from transformers' own models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

Tensors = dict[str, NDArray[np.float32]]

HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 64, 96, 4, 2, 32, 2
THETA = 50_000.0

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
DEFINED = ["<think>"]
_CORPUS = [
    "the dormouse sleeps and the dormouse wakes",
    "where it was, what it said: 12345 67890",
    "été 日本 🦫",
]

_SUFFIXES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
}
_NORMS = {"post_attention_layernorm": "ffn_norm"}
_GEMMA_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def byte_level_tokenizer() -> Tokenizer:
    """A small trained byte-level BPE with SmolLM's splitting and a few special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        show_progress=False,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.add_tokens(DEFINED)
    return tokenizer


def sentencepiece_metadata() -> dict[str, Any]:
    """A vocabulary with byte tokens, runs of spaces as Gemma stores them, and scores instead of merges."""
    tokens = ["<pad>", "</s>", "<s>", "<unk>", "  ", "   ", "<code>"]
    types = [3, 3, 3, 2, 4, 4, 4]
    tokens += [f"<0x{byte:02X}>" for byte in range(256)]
    types += [6] * 256
    words = ["th", "the", "▁the", "dor", "do", "▁d", "▁dor", "mo", "us", "mous", "mouse", "▁dormouse"]
    words += ["▁", *"thedormusabcxyz12", "é"]
    words = list(dict.fromkeys(words))
    scores = [-1000.0] * 7 + [0.0] * 256 + [-float(index) for index in range(len(words))]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens + words,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types + [1] * len(words),
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 3,
        "tokenizer.ggml.add_space_prefix": False,
    }


def byte_level_metadata(pre: str = "smollm") -> dict[str, Any]:
    """The tokenizer keys of `byte_level_tokenizer`."""
    tokenizer = byte_level_tokenizer()
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    tokens = sorted(vocab, key=lambda token: vocab[token])
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    kinds = {**dict.fromkeys(SPECIAL, 3), **dict.fromkeys(DEFINED, 4)}
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [kinds.get(token, 1) for token in tokens],
        "tokenizer.ggml.merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in merges],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }


def shape_metadata(arch: str, **extra: Any) -> dict[str, Any]:
    """The size keys of a toy model of architecture `arch`."""
    sizes = {
        "block_count": LAYERS,
        "context_length": 512,
        "embedding_length": HIDDEN,
        "feed_forward_length": INNER,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.key_length": HEAD_DIM,
        "attention.value_length": HEAD_DIM,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": THETA,
        **extra,
    }
    return {"general.architecture": arch} | {f"{arch}.{key}": value for key, value in sizes.items()}


def random_tensors(vocab_size: int, *, layers: int = LAYERS, seed: int = 0) -> Tensors:
    """A Llama's tensors under their Hugging Face names; values that bf16 holds exactly."""
    random = np.random.default_rng(seed)
    q, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab_size, HIDDEN)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.input_layernorm.weight": (HIDDEN,),
            f"{prefix}.self_attn.q_proj.weight": (q, HIDDEN),
            f"{prefix}.self_attn.k_proj.weight": (kv, HIDDEN),
            f"{prefix}.self_attn.v_proj.weight": (kv, HIDDEN),
            f"{prefix}.self_attn.o_proj.weight": (HIDDEN, q),
            f"{prefix}.post_attention_layernorm.weight": (HIDDEN,),
            f"{prefix}.mlp.gate_proj.weight": (INNER, HIDDEN),
            f"{prefix}.mlp.up_proj.weight": (INNER, HIDDEN),
            f"{prefix}.mlp.down_proj.weight": (HIDDEN, INNER),
        }
    shapes["model.norm.weight"] = (HIDDEN,)
    return {name: as_bf16(random.standard_normal(shape, np.float32)) for name, shape in shapes.items()}


def as_bf16(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Cut to what bf16 can hold."""
    return (np.ascontiguousarray(values).view(np.uint32) & 0xFFFF0000).view(np.float32)


def write_gguf(
    path: Path,
    arch: str,
    tensors: Tensors,
    metadata: dict[str, Any],
    *,
    quantization: gguf.GGMLQuantizationType | None = None,
    raw: Tensors | None = None,
) -> Path:
    """A GGUF file of `tensors` (Hugging Face names), converted as llama.cpp converts them.

    Matrices are stored as `quantization`, else F32; `raw` tensors go in under their own names.
    """
    writer = gguf.GGUFWriter(path, arch)
    for key, value in metadata.items():
        if key != "general.architecture":
            _add(writer, key, value)
    for name, values in tensors.items():
        stored, converted = _convert(arch, name, values)
        if quantization is not None and converted.ndim > 1:
            writer.add_tensor(stored, gguf.quants.quantize(converted, quantization), raw_dtype=quantization)
        else:
            writer.add_tensor(stored, np.ascontiguousarray(converted))
    for name, values in (raw or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def toy_llama(path: Path, *, metadata: dict[str, Any] | None = None, **options: Any) -> Tensors:
    """Write a toy Llama with the byte-level tokenizer and return what went in."""
    keys = shape_metadata("llama") | byte_level_metadata() | (metadata or {})
    tensors = random_tensors(len(keys["tokenizer.ggml.tokens"]))
    write_gguf(path, "llama", tensors, {k: v for k, v in keys.items() if v is not None}, **options)
    return tensors


def _convert(arch: str, name: str, values: NDArray[np.float32]) -> tuple[str, NDArray[np.float32]]:
    stem, kind = name.rsplit(".", 1)
    if arch in ("llama", "smollm3") and stem.endswith(("q_proj", "k_proj")):
        values = _permuted(values, HEADS if stem.endswith("q_proj") else KV_HEADS)
    if arch == "gemma3" and stem.endswith("norm"):
        values = values + np.float32(1)
    if stem in _TOP:
        return f"{_TOP[stem]}.{kind}", values
    _, _, layer, part = stem.split(".", 3)
    suffix = (_SUFFIXES | (_GEMMA_NORMS if arch == "gemma3" else _NORMS))[part]
    return f"blk.{layer}.{suffix}.{kind}", values


def _permuted(weights: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """`LlamaModel.permute` of llama.cpp's convert_hf_to_gguf.py."""
    rows = weights.shape[0]
    halves = weights.reshape(heads, 2, rows // heads // 2, *weights.shape[1:])
    return halves.swapaxes(1, 2).reshape(weights.shape)


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
