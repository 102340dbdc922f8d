"""Toy models of every family with random weights, and ways to run them in chunks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from numpy.typing import NDArray
from torch.nn import Module
from transformers import PreTrainedModel

from dormouse.domain.cache_spec import KVFormat
from dormouse.domain.plan import Chunk, Plan
from dormouse.runtimes.context import AS_TRAINED, Context
from dormouse.runtimes.torch.runtime import TorchRuntime

VOCAB = 97
BLOCK = 16

_SHAPE: Mapping[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 100,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
_GEMMA = {
    "num_hidden_layers": 4,
    "query_pre_attn_scalar": 24,
    "sliding_window": 20,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5000.0},
    },
}
TOYS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-tied-heads-of-64": ("Llama", {"tie_word_embeddings": True, "head_dim": 64}),
    "llama-all-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama3-rope": ("Llama", {"rope_parameters": _LLAMA3_ROPE}),
    "llama-linear-rope": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0}}),
    "llama-yarn-rope": ("Llama", {"rope_parameters": _YARN_ROPE}),
    "llama-yarn-magnitude": ("Llama", {"rope_parameters": {**_YARN_ROPE, "attention_factor": 0.7}}),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0, 1], "tie_word_embeddings": True}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral-sliding": ("Mistral", {"sliding_window": 21}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-sliding": ("Qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {}),
    "gemma3": ("Gemma3", _GEMMA),
}


def save_toy(
    name: str,
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    changes: Mapping[str, Any] | None = None,
    max_shard_size: str = "1GB",
) -> PreTrainedModel:
    """Make the toy, save it to `folder` as transformers does, and return it."""
    family, own = TOYS[name]
    config_name = "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config"
    config = getattr(transformers, config_name)(**{**_SHAPE, **own, **(changes or {})})
    config._attn_implementation = "eager"
    torch.manual_seed(len(name))
    model: PreTrainedModel = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases start as ones and zeros, which would hide mistakes
                parameter.add_(torch.randn_like(parameter) * 0.2)
    Module.to(model, dtype)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model


def load_toy(
    folder: Path,
    kv_format: KVFormat = KVFormat.F32,
    dtype: str = "fp32",
    num_pages: int = 24,
    context: Context = AS_TRAINED,
) -> TorchRuntime:
    """A runtime with blocks of 16."""
    return TorchRuntime.load(
        folder,
        name="toy",
        kv_format=kv_format,
        block_size=BLOCK,
        arena_tokens=num_pages * BLOCK,
        dtype=dtype,
        context=context,
    )


def toy_tokens(count: int, seed: int = 0) -> tuple[int, ...]:
    """Random token ids."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(0, VOCAB, (count,), generator=generator).tolist())


def chunk_of(
    tokens: Sequence[int], start: int, end: int, pages: Sequence[int], block_size: int = BLOCK
) -> Chunk:
    """The chunk `tokens[start:end]` of a sequence that lives in `pages`."""
    return Chunk(tuple(tokens[start:end]), start, tuple(pages[: -(-end // block_size)]), True)


def prefill(
    runtime: TorchRuntime, tokens: Sequence[int], pages: Sequence[int], sizes: Sequence[int]
) -> list[NDArray[Any]]:
    """Compute `tokens` in chunks of `sizes` (the last one repeated); the logits after each chunk."""
    logits, start, turn = [], 0, 0
    while start < len(tokens):
        end = min(start + sizes[min(turn, len(sizes) - 1)], len(tokens))
        chunk = chunk_of(tokens, start, end, pages, runtime.cache.block_size)
        logits.append(runtime.forward(Plan((chunk,)))[0])
        start, turn = end, turn + 1
    return logits


def stored(runtime: TorchRuntime, pages: Sequence[int], num_tokens: int) -> list[bytes]:
    """The bytes of a sequence's pages, with what is past its end as zeros."""
    size = runtime.cache.block_size
    counts = [min(size, num_tokens - start) for start in range(0, num_tokens, size)]
    return [runtime.read_page(page, count) for page, count in zip(pages, counts, strict=False)]
