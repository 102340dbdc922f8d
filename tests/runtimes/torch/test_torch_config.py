"""What a config.json is read as, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from transformers import Gemma3Config, Gemma3TextConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from dormouse.domain.errors import UnsupportedModel
from dormouse.runtimes.decoder_config import DecoderConfig
from dormouse.runtimes.rope import Rope
from dormouse.runtimes.torch.rope import RopeTable, frequencies

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
}


def parse(**changes: Any) -> DecoderConfig:
    return DecoderConfig.from_hf({**LLAMA, **changes})


def test_old_and_new_rope_spellings_are_one() -> None:
    scaling = {"rope_type": "linear", "factor": 4.0}
    old = parse(rope_theta=5000.0, rope_scaling=scaling)
    older = parse(rope_theta=5000.0, rope_scaling={"type": "linear", "factor": 4.0})
    new = parse(rope_parameters={**scaling, "rope_theta": 5000.0})
    assert old == older == new
    assert new.layers[0].rope == Rope("linear", 5000.0, factor=4.0)


def test_omitted_fields_take_their_family_s_defaults() -> None:
    text: dict[str, Any] = {"num_hidden_layers": 7, "hidden_size": 2560}
    config = DecoderConfig.from_hf({"model_type": "gemma3", "text_config": text})
    assert DecoderConfig.from_hf(json.loads(Gemma3Config(text_config=text).to_json_string())) == config
    assert [layer.window for layer in config.layers] == [4096] * 5 + [None, 4096]
    assert config.layers[5].rope == Rope("default", 1e6)
    assert config.layers[0].rope == Rope("default", 1e4)


def test_gemma_3_scales_global_layers_only_in_both_spellings() -> None:
    scaling = {"rope_type": "linear", "factor": 8.0}
    old = {"model_type": "gemma3_text", "rope_scaling": scaling, "rope_local_base_freq": 10000.0}
    new = json.loads(Gemma3TextConfig.from_dict({"rope_scaling": scaling}).to_json_string())
    assert DecoderConfig.from_hf(old) == DecoderConfig.from_hf(new)
    assert DecoderConfig.from_hf(old).layers[5].rope == Rope("linear", 1e6, factor=8.0)
    assert DecoderConfig.from_hf(old).layers[0].rope == Rope("default", 1e4)


def test_sliding_windows_come_from_the_family_s_rule_or_from_layer_types() -> None:
    qwen = {"model_type": "qwen3", "num_hidden_layers": 3, "sliding_window": 9, "max_window_layers": 1}
    windows = [layer.window for layer in parse(**qwen, use_sliding_window=True).layers]
    assert windows == [None, 9, 9]
    types = ["sliding_attention", "full_attention", "full_attention"]
    windows = [layer.window for layer in parse(**qwen, use_sliding_window=True, layer_types=types).layers]
    assert windows == [9, None, None]
    assert [layer.window for layer in parse(**qwen, layer_types=types).layers] == [None] * 3
    assert [layer.window for layer in parse(model_type="mistral").layers] == [4096] * 2


def test_smollm3_leaves_every_fourth_layer_without_rope() -> None:
    layers = parse(model_type="smollm3", num_hidden_layers=8).layers
    assert [layer.rope is None for layer in layers] == [False, False, False, True] * 2


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "mixtral"}, "mixtral"),
        ({"model_type": None}, "model_type"),
        ({"num_local_experts": 8}, "num_local_experts"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_interleaved": True}, "rope_interleaved"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "longrope"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "wobble": 1}}, "wobble"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1}}, "high_freq_factor"),
        ({"hidden_act": "relu"}, "relu"),
        ({"num_key_value_heads": 3, "num_attention_heads": 4}, "KV heads"),
        ({"head_dim": 33}, "odd"),
        ({"vocab_size": None}, "vocab_size"),
        ({"layer_types": ["sliding_attention", "full_attention"]}, "layer_types"),
        (
            {"model_type": "qwen3", "use_sliding_window": True, "layer_types": ["chunked_attention"] * 2},
            "chunked",
        ),
        (
            {"model_type": "qwen3", "use_sliding_window": True, "layer_types": ["full_attention"]},
            "layer_types",
        ),
        ({"model_type": "smollm3", "no_rope_layers": [1]}, "no_rope_layers"),
    ],
)
def test_what_the_decoder_lacks_is_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedModel, match=named):
        parse(**changes)


def test_a_null_is_the_default_but_a_null_window_is_none() -> None:
    assert parse(rope_theta=None, hidden_act=None) == parse()
    layers = parse(model_type="mistral", sliding_window=None).layers
    assert [layer.window for layer in layers] == [None, None]


def test_canonical_text_tells_configs_apart() -> None:
    assert parse().canonical() == parse(torch_dtype="bfloat16", rope_theta=10000.0).canonical()
    assert parse().canonical() != parse(rope_theta=20000.0).canonical()


def test_yarn_mscale_matches_transformers() -> None:
    from transformers import LlamaConfig

    yarn = {"rope_type": "yarn", "factor": 40.0, "mscale": 0.7, "mscale_all_dim": 1.0, "truncate": False}
    rope_parameters = {**yarn, "rope_theta": 1000.0, "original_max_position_embeddings": 128}
    reference = LlamaConfig(hidden_size=64, num_attention_heads=1, rope_parameters=dict(rope_parameters))
    expected, magnitude = ROPE_INIT_FUNCTIONS["yarn"](reference)
    rope = parse(rope_parameters=rope_parameters).layers[0].rope
    assert rope is not None
    torch.testing.assert_close(frequencies(rope, 64), expected)
    assert rope.magnitude == pytest.approx(magnitude)


def test_a_rope_table_does_not_depend_on_its_length() -> None:
    rope = Rope("default", 10000.0)
    short, long = (RopeTable.build(rope, 64, count, torch.device("cpu")) for count in (10, 9000))
    assert torch.equal(short.cos, long.cos[: len(short.cos)])
    assert torch.equal(short.sin, long.sin[: len(short.sin)])
