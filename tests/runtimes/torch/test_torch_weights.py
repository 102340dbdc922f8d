"""Weights in one file or many, and what is said of those that do not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.runtimes.torch.conftest import Toy
from tests.runtimes.torch.toys import load_toy, prefill, save_toy, toy_tokens
from torch import Tensor
from transformers import LlamaForCausalLM

from dormouse.domain.errors import ModelFilesMissing, UnsupportedModel

PAGES = (0, 1, 2)


def changed(source: Path, folder: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """A copy of a toy's folder with its tensors changed."""
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    save_file(tensors, folder / "model.safetensors")
    return folder


def logits_of(folder: Path) -> bytes:
    return prefill(load_toy(folder), toy_tokens(20), PAGES, [20])[0].tobytes()


def test_shards_give_the_same_model(toy: Callable[[str], Toy], tmp_path: Path) -> None:
    save_toy("gemma3", tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert logits_of(tmp_path) == logits_of(toy("gemma3")[0])


def test_an_absent_shard_is_named(tmp_path: Path) -> None:
    save_toy("llama", tmp_path, max_shard_size="100KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ModelFilesMissing, match=shard.name):
        load_toy(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": {"a": "../model.safetensors"}}'])
def test_an_index_that_is_none_is_a_typed_error(text: str, tmp_path: Path) -> None:
    save_toy("llama", tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UnsupportedModel, match="index"):
        load_toy(tmp_path)


def test_the_maker_s_own_copy_of_the_weights_is_left_aside(toy: Callable[[str], Toy], tmp_path: Path) -> None:
    folder = changed(toy("llama")[0], tmp_path, leave)
    save_file({"layers.0.attention.wq.weight": torch.zeros(1)}, folder / "consolidated.safetensors")
    assert logits_of(folder) == logits_of(toy("llama")[0])


def test_a_folder_without_weights_or_config_says_so(toy: Callable[[str], Toy], tmp_path: Path) -> None:
    with pytest.raises(ModelFilesMissing, match=r"config\.json"):
        load_toy(tmp_path)
    (tmp_path / "config.json").write_bytes((toy("llama")[0] / "config.json").read_bytes())
    with pytest.raises(ModelFilesMissing, match="safetensors"):
        load_toy(tmp_path)


def test_a_truncated_file_is_a_typed_error(toy: Callable[[str], Toy], tmp_path: Path) -> None:
    folder = changed(toy("llama")[0], tmp_path, leave)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UnsupportedModel, match=r"model\.safetensors"):
        load_toy(folder)


@pytest.mark.parametrize("text", ["", "[]", "{"])
def test_a_config_that_is_no_object_is_a_typed_error(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UnsupportedModel, match=r"config\.json"):
        load_toy(tmp_path)


def leave(tensors: dict[str, Tensor]) -> None:
    assert tensors


def drop(tensors: dict[str, Tensor]) -> None:
    del tensors["model.layers.1.mlp.up_proj.weight"]


def add(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(128)


def reshape(tensors: dict[str, Tensor]) -> None:
    tensors["model.norm.weight"] = torch.zeros(65)


def quantize(tensors: dict[str, Tensor]) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)


@pytest.mark.parametrize(
    ("change", "error", "named"),
    [
        (drop, ModelFilesMissing, r"layers\.1\.mlp\.up_proj"),
        (add, UnsupportedModel, r"q_proj\.bias"),
        (reshape, UnsupportedModel, "norm"),
        (quantize, UnsupportedModel, "int8"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    change: Callable[[dict[str, Tensor]], None],
    error: type[Exception],
    named: str,
    toy: Callable[[str], Toy],
    tmp_path: Path,
) -> None:
    with pytest.raises(error, match=named):
        load_toy(changed(toy("llama")[0], tmp_path, change))


def test_old_frequencies_and_a_tied_head_are_left_aside(toy: Callable[[str], Toy], tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(16)
        tensors["lm_head.weight"] = torch.zeros(97, 64)

    source = toy("llama-tied-heads-of-64")[0]
    assert logits_of(changed(source, tmp_path, change)) == logits_of(source)


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_the_text_part_of_a_multimodal_checkpoint(
    prefix: str, toy: Callable[[str], Toy], tmp_path: Path
) -> None:
    source = toy("gemma3")[0]

    def change(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[prefix + name.removeprefix("model.")] = tensors.pop(name)
        tensors["model.vision_tower.encoder.weight"] = torch.zeros(1)
        tensors["multi_modal_projector.mm_input_projection_weight"] = torch.zeros(1)

    folder = changed(source, tmp_path, change)
    text = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": text}))
    assert logits_of(folder) == logits_of(source)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_files_compute_in_fp32(dtype: torch.dtype, tmp_path: Path) -> None:
    save_toy("llama", tmp_path, dtype=dtype)
    model = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokens = toy_tokens(20)
    logits = torch.from_numpy(prefill(load_toy(tmp_path), tokens, PAGES, [20])[0])
    with torch.no_grad():
        torch.testing.assert_close(logits, model(torch.tensor([tokens])).logits[0, -1], atol=1e-4, rtol=1e-4)
