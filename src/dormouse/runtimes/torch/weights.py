"""Weights from safetensors files, read lazily: each layer is fused and packed before the next is touched.

Files are memory-mapped by safetensors, so what was packed can be dropped by the system, and never are there
two full copies of a model. The embedding stays mapped on the CPU: only rows that are looked up take memory.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dormouse.domain.errors import ModelFilesMissing, UnsupportedModel
from dormouse.runtimes.decoder_config import DecoderConfig
from dormouse.runtimes.rope import Rope
from dormouse.runtimes.torch.decoder import Decoder
from dormouse.runtimes.torch.layers import Layer
from dormouse.runtimes.torch.linear import Linear
from dormouse.runtimes.torch.rope import RopeTable

_PREFIXES = ("model.", "language_model.model.", "model.language_model.")
"""Where the decoder's tensors lie: plain models, and the text part of Gemma 3 before and since 4.52."""

_NOT_OURS = re.compile(r"(^|\.)(vision_tower|multi_modal_projector)\.|rotary_emb\.inv_freq$")
"""Tensors that the text decoder does not need: the vision part, and frequencies that old files carry."""

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Checkpoint:
    """All tensors of a model folder by name, without the prefix that the decoder's share."""

    def __init__(self, files: Sequence[Path]) -> None:
        """Open the files and read their headers. Raises UnsupportedModel for a file that is not one."""
        self._files: dict[str, Any] = {}
        for path in files:
            try:
                file: Any = safe_open(path, framework="pt")
            except (SafetensorError, OSError, ValueError) as exc:
                raise UnsupportedModel(f"{path} is not a whole safetensors file: {exc}") from exc
            self._files.update(dict.fromkeys(file.keys(), file))
        self._stored_names = {_short_name(name): name for name in self._files}

    def __contains__(self, name: str) -> bool:
        return name in self._stored_names

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor by short name."""
        stored = self._stored_names.items()
        return {short: tuple(self._files[name].get_slice(name).get_shape()) for short, name in stored}

    def tensor(self, name: str) -> Tensor:
        """The tensor by its short name, mapped, in its stored dtype."""
        stored = self._stored_names[name]
        tensor: Tensor = self._files[stored].get_tensor(stored)
        if tensor.dtype not in _DTYPES:
            raise UnsupportedModel(f"tensor {stored} is {tensor.dtype}; weights must be fp32, fp16 or bf16")
        return tensor


def _short_name(name: str) -> str:
    for prefix in sorted(_PREFIXES, key=len, reverse=True):
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return name.removeprefix("language_model.")


def check_tensors(config: DecoderConfig, found: Mapping[str, tuple[int, ...]]) -> None:
    """Hold the tensors of a checkpoint against what the decoder will read.

    Raises ModelFilesMissing for tensors that are not there, UnsupportedModel for ones that the decoder would
    not use, or of another shape.
    """
    expected = _expected_shapes(config)
    if missing := sorted(expected.keys() - found.keys()):
        raise ModelFilesMissing(f"the weights lack {_some(missing)}")
    extra = {name for name in found.keys() - expected.keys() if not _NOT_OURS.search(name)}
    if config.tied_embeddings:
        extra.discard("lm_head.weight")
    if extra:
        raise UnsupportedModel(
            f"the weights hold tensors that the decoder has no use for: {_some(sorted(extra))}"
        )
    for name, shape in expected.items():
        if found[name] != shape:
            raise UnsupportedModel(f"{name} is {list(found[name])}, config.json makes it {list(shape)}")


def _some(names: Sequence[str]) -> str:
    more = len(names) - 8
    return ", ".join(names[:8]) + (f" and {more} more" if more > 0 else "")


def _expected_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    hidden, ffn, head = config.hidden_size, config.intermediate_size, config.head_dim
    q, kv = config.num_heads * head, config.num_kv_heads * head
    linears = {
        "self_attn.q_proj": (q, hidden, config.qkv_bias),
        "self_attn.k_proj": (kv, hidden, config.qkv_bias),
        "self_attn.v_proj": (kv, hidden, config.qkv_bias),
        "self_attn.o_proj": (hidden, q, config.o_bias),
        "mlp.gate_proj": (ffn, hidden, config.mlp_bias),
        "mlp.up_proj": (ffn, hidden, config.mlp_bias),
        "mlp.down_proj": (hidden, ffn, config.mlp_bias),
    }
    norms = dict.fromkeys(("input_layernorm", "post_attention_layernorm"), hidden)
    if config.sandwich_norms:
        norms |= dict.fromkeys(("pre_feedforward_layernorm", "post_feedforward_layernorm"), hidden)
    if config.qk_norm:
        norms |= dict.fromkeys(("self_attn.q_norm", "self_attn.k_norm"), head)
    shapes: dict[str, tuple[int, ...]] = {
        "embed_tokens.weight": (config.vocab_size, hidden),
        "norm.weight": (hidden,),
    }
    if not config.tied_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    for layer in range(len(config.layers)):
        for name, (rows, columns, has_bias) in linears.items():
            shapes[f"layers.{layer}.{name}.weight"] = (rows, columns)
            if has_bias:
                shapes[f"layers.{layer}.{name}.bias"] = (rows,)
        shapes |= {f"layers.{layer}.{name}.weight": (size,) for name, size in norms.items()}
    return shapes


class DecoderLoader:
    """Builds a `Decoder` from a checkpoint on one device in one compute dtype, and counts its bytes."""

    def __init__(
        self,
        config: DecoderConfig,
        checkpoint: Checkpoint,
        device: torch.device,
        dtype: torch.dtype,
        make_linear: Callable[[Tensor, Tensor | None], Linear],
    ) -> None:
        check_tensors(config, checkpoint.shapes)
        self.nbytes = 0
        self._config = config
        self._checkpoint = checkpoint
        self._device = device
        self._dtype = dtype
        self._make_linear = make_linear

    def load(self, num_positions: int) -> Decoder:
        """The decoder, with rope tables for `num_positions` positions."""
        config = self._config
        ropes = list(dict.fromkeys(layer.rope for layer in config.layers if layer.rope is not None))
        layers = tuple(self._layer(index, ropes) for index in range(len(config.layers)))
        embedding = self._checkpoint.tensor("embed_tokens.weight")
        if self._device.type != "cpu":
            embedding = embedding.to(self._device, self._dtype)
        head = (
            self._make_linear(embedding.to(self._dtype), None)
            if config.tied_embeddings
            else self._linear("lm_head")
        )
        if config.tied_embeddings:
            self.nbytes += head.nbytes
        # Rounded as transformers rounds it (Gemma3TextScaledWordEmbedding): Gemma was trained with that.
        scale = torch.tensor(config.embedding_scale).to(self._dtype).item()
        tables = tuple(RopeTable.build(rope, config.head_dim, num_positions, self._device) for rope in ropes)
        return Decoder(config, self._dtype, embedding, scale, layers, self._norm("norm"), head, tables)

    def _layer(self, index: int, ropes: Sequence[Rope]) -> Layer:
        config, at = self._config, f"layers.{index}."
        rope = config.layers[index].rope
        sandwich = config.sandwich_norms
        attention = at + "self_attn."
        mlp_norm = "pre_feedforward_layernorm" if sandwich else "post_attention_layernorm"
        return Layer(
            input_norm=self._norm(at + "input_layernorm"),
            qkv=self._linear(*(f"{attention}{name}_proj" for name in "qkv")),
            q_norm=self._norm(attention + "q_norm") if config.qk_norm else None,
            k_norm=self._norm(attention + "k_norm") if config.qk_norm else None,
            o=self._linear(attention + "o_proj"),
            attention_output_norm=self._norm(at + "post_attention_layernorm") if sandwich else None,
            mlp_norm=self._norm(at + mlp_norm),
            gate_up=self._linear(at + "mlp.gate_proj", at + "mlp.up_proj"),
            down=self._linear(at + "mlp.down_proj"),
            mlp_output_norm=self._norm(at + "post_feedforward_layernorm") if sandwich else None,
            window=config.layers[index].window,
            rope=None if rope is None else ropes.index(rope),
        )

    def _linear(self, *names: str) -> Linear:
        """One layer that gives the outputs of all `names`, one after the other."""
        weight = torch.cat([self._tensor(f"{name}.weight") for name in names])
        has_bias = f"{names[0]}.bias" in self._checkpoint
        bias = torch.cat([self._tensor(f"{name}.bias") for name in names]) if has_bias else None
        linear = self._make_linear(weight, bias)
        self.nbytes += linear.nbytes
        return linear

    def _norm(self, name: str) -> Tensor:
        weight = self._tensor(f"{name}.weight").clone()  # so that no whole file stays mapped for it
        self.nbytes += weight.nbytes
        return weight

    def _tensor(self, name: str) -> Tensor:
        return self._checkpoint.tensor(name).to(self._device, self._dtype)
