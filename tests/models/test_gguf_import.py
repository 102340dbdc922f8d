"""What goes into a GGUF file comes out of its import: weights, config, tokenizer, end tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.models.toy_gguf import (
    HEAD_DIM,
    HEADS,
    HIDDEN,
    INNER,
    KV_HEADS,
    LAYERS,
    THETA,
    Tensors,
    byte_level_metadata,
    byte_level_tokenizer,
    random_tensors,
    sentencepiece_metadata,
    shape_metadata,
    toy_llama,
    write_gguf,
)
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from dormouse.domain.errors import ModelError, UnsupportedModel
from dormouse.models import gguf_import
from dormouse.models.bf16_weights import shards_of, to_bf16, write_shards
from dormouse.models.folder import open_folder
from dormouse.models.gguf_architectures import architecture_of, model_config, planned_tensors
from dormouse.models.gguf_file import GgufFile
from dormouse.models.gguf_import import import_gguf
from dormouse.models.gguf_rope import llama3_factors

AUTO_MODEL: Any = AutoModelForCausalLM

TEXTS = ["the dormouse wakes at 12:45", "  été\n\n日本 🦫\t", "<|im_start|>user\n<think>hm", ""]


def imported(path: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in open_folder(path).weights:
        tensors |= load_file(file)
    return tensors


def assert_same(tensors: dict[str, torch.Tensor], expected: Tensors) -> None:
    assert tensors.keys() == expected.keys()
    for name, values in expected.items():
        assert tensors[name].dtype == torch.bfloat16
        assert torch.equal(tensors[name].float(), torch.from_numpy(values)), name


def test_every_tensor_of_a_llama_comes_back(tmp_path: Path) -> None:
    expected = toy_llama(tmp_path / "toy.gguf")
    folder = import_gguf(tmp_path / "toy.gguf", tmp_path / "toy")
    assert folder.name == "toy"
    assert_same(imported(folder.path), expected)


@pytest.mark.parametrize("name", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_quantized_tensors_come_back_as_their_rounded_values(tmp_path: Path, name: str) -> None:
    quantization = gguf.GGMLQuantizationType[name]
    tensors = toy_llama(tmp_path / "toy.gguf", quantization=quantization)
    got = imported(import_gguf(tmp_path / "toy.gguf", tmp_path / "toy").path)
    key = "model.layers.1.mlp.down_proj.weight"
    rounded = gguf.quants.dequantize(gguf.quants.quantize(tensors[key], quantization), quantization)
    assert torch.equal(got[key], torch.from_numpy(rounded).bfloat16())
    # Quantizing and permuting rows commute.
    key = "model.layers.0.self_attn.q_proj.weight"
    rounded = gguf.quants.dequantize(gguf.quants.quantize(tensors[key], quantization), quantization)
    assert torch.equal(got[key], torch.from_numpy(rounded).bfloat16())


def test_bf16_rounds_as_torch_does() -> None:
    values = np.random.default_rng(1).standard_normal(10_000, np.float32)
    values[:4] = [0.0, -0.0, 1.00390625, 1.01171875]  # the last two lie halfway
    expected = torch.from_numpy(values).bfloat16().view(torch.uint16).numpy()
    assert np.array_equal(to_bf16(values), expected)


GEMMA_KEYS = {"attention.sliding_window": 8}
FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", {}, {}),
    "llama-untied": ("llama", {"tie_word_embeddings": False}, {}),
    "qwen2": ("qwen2", {}, {}),
    "qwen3": ("qwen3", {"tie_word_embeddings": False}, {}),
    "gemma3": ("gemma3_text", {"sliding_window": 8, "num_hidden_layers": 7}, GEMMA_KEYS | {"block_count": 7}),
    "smollm3": ("smollm3", {"num_hidden_layers": 5, "pad_token_id": 0}, {"block_count": 5}),
}


def original(model_type: str, vocab_size: int, **extra: Any) -> Any:
    """transformers' model, with random weights that bf16 holds exactly."""
    settings = {
        "vocab_size": vocab_size,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    }
    rope: Any = {"rope_type": "default", "rope_theta": THETA}
    if model_type == "gemma3_text":
        settings["query_pre_attn_scalar"] = HEAD_DIM
        local = {"rope_type": "default", "rope_theta": 10_000.0}
        rope = {"full_attention": rope, "sliding_attention": local}
    config = AutoConfig.for_model(model_type, **(settings | {"rope_parameters": rope} | extra))
    torch.manual_seed(0)
    model = AUTO_MODEL.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            # Norms and biases are constants at first, which would hide a mistake in them.
            parameter.copy_(torch.randn_like(parameter).mul_(0.3).bfloat16())
    return model.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_an_imported_model_computes_what_the_original_does(tmp_path: Path, family: str) -> None:
    model_type, extra, keys = FAMILIES[family]
    arch = family.split("-")[0]
    metadata = shape_metadata(arch, **keys) | byte_level_metadata()
    vocab_size = len(metadata["tokenizer.ggml.tokens"])
    model = original(model_type, vocab_size, **extra)
    state = {k: v.numpy() for k, v in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight")
    write_gguf(tmp_path / "toy.gguf", arch, state, metadata)
    folder = import_gguf(tmp_path / "toy.gguf", tmp_path / "toy")

    loaded, info = AUTO_MODEL.from_pretrained(folder.path, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    assert_same(imported(folder.path), state)
    ids = torch.randint(vocab_size, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


def test_llama3_rope_scaling_is_recovered_from_its_factors(tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    factors = llama3_factors(THETA, HEAD_DIM, scaling).astype(np.float32)
    toy_llama(tmp_path / "toy.gguf", raw={"rope_freqs.weight": factors})
    folder = import_gguf(tmp_path / "toy.gguf", tmp_path / "toy")
    assert folder.config["rope_scaling"] == scaling
    # transformers derives the same frequencies from it.
    rotary = AUTO_MODEL.from_config(AutoConfig.from_pretrained(folder.path)).model.rotary_emb
    plain = THETA ** -(np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    np.testing.assert_allclose(rotary.inv_freq.numpy(), plain / factors, rtol=1e-5)


def test_unknown_rope_factors_are_refused(tmp_path: Path) -> None:
    factors = np.linspace(1, 7, HEAD_DIM // 2, dtype=np.float32)
    toy_llama(tmp_path / "toy.gguf", raw={"rope_freqs.weight": factors})
    with pytest.raises(UnsupportedModel, match="not Llama 3"):
        import_gguf(tmp_path / "toy.gguf", tmp_path / "toy")


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"type": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        (
            {"type": "yarn", "factor": 4.0, "original_context_length": 128},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
        ),
        ({"type": "none"}, None),
    ],
)
def test_declared_rope_scaling(tmp_path: Path, keys: dict[str, Any], expected: object) -> None:
    toy_llama(tmp_path / "toy.gguf", metadata={f"llama.rope.scaling.{k}": v for k, v in keys.items()})
    assert import_gguf(tmp_path / "toy.gguf", tmp_path / "toy").config["rope_scaling"] == expected


def test_large_models_are_cut_into_shards(tmp_path: Path) -> None:
    expected = toy_llama(tmp_path / "toy.gguf")
    folder = import_gguf(tmp_path / "toy.gguf", tmp_path / "toy").path
    file = GgufFile(tmp_path / "toy.gguf")
    architecture = architecture_of(file)
    tensors = list(planned_tensors(file, architecture, model_config(file, architecture)))
    shards = shards_of(tensors, limit=50_000)
    assert len(shards) > 3
    (folder / "model.safetensors").unlink()
    write_shards(file, shards, folder, lambda _done, _total: None)
    assert [path.name for path in open_folder(folder).weights] == [shard.file_name for shard in shards]
    assert_same(imported(folder), expected)
    assert AUTO_MODEL.from_pretrained(folder) is not None


def test_byte_level_tokenizer_encodes_as_the_original(tmp_path: Path) -> None:
    toy_llama(tmp_path / "toy.gguf")
    folder = import_gguf(tmp_path / "toy.gguf", tmp_path / "toy")
    built = Tokenizer.from_file(str(folder.path / "tokenizer.json"))
    by_transformers = AutoTokenizer.from_pretrained(folder.path)
    source = byte_level_tokenizer()
    for text in TEXTS:
        ids = source.encode(text).ids
        assert built.encode(text).ids == ids
        assert by_transformers.encode(text) == ids
        assert built.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("smollm", "it's 1234 x", ["it", "'s", "Ġ", "1", "2", "3", "4", "Ġx"]),
        ("default", "it's 1234 x", ["it", "'s", "Ġ1234", "Ġx"]),
        ("llama-bpe", "it's 1234 x", ["it", "'s", "Ġ", "123", "4", "Ġx"]),
        ("qwen2", "IT'S 1234\n\nx", ["IT", "'S", "Ġ", "1", "2", "3", "4", "ĊĊ", "x"]),
        ("tekken", "HelloWorld 12", ["Hello", "World", "Ġ", "1", "2"]),
    ],
)
def test_pre_tokenizers_cut_as_their_models_were_trained(
    tmp_path: Path, pre: str, text: str, pieces: list[str]
) -> None:
    toy_llama(tmp_path / "toy.gguf", metadata={"tokenizer.ggml.pre": pre})
    folder = import_gguf(tmp_path / "toy.gguf", tmp_path / "toy")
    cutter = Tokenizer.from_file(str(folder.path / "tokenizer.json")).pre_tokenizer
    assert [piece for piece, _ in cutter.pre_tokenize_str(text)] == pieces


def test_sentencepiece_tokenizer_merges_by_score(tmp_path: Path) -> None:
    metadata = shape_metadata("llama") | sentencepiece_metadata()
    tensors = random_tensors(len(metadata["tokenizer.ggml.tokens"]))
    write_gguf(tmp_path / "toy.gguf", "llama", tensors, metadata)
    folder = import_gguf(tmp_path / "toy.gguf", tmp_path / "toy")
    tokenizer = Tokenizer.from_file(str(folder.path / "tokenizer.json"))
    # BOS unless the file says otherwise; two and three spaces are tokens of their own.
    assert tokenizer.encode("a the dormouse").tokens == ["<s>", "a", "▁the", "▁dormouse"]
    assert tokenizer.encode("a   b", add_special_tokens=False).tokens == ["a", "▁▁▁", "b"]
    assert tokenizer.encode("<code>a", add_special_tokens=False).tokens == ["<code>", "a"]
    assert tokenizer.encode("龘", add_special_tokens=False).tokens == ["<0xE9>", "<0xBE>", "<0x98>"]
    for text in ["the  dormouse   é 龘\n", "  a"]:
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
        assert AutoTokenizer.from_pretrained(folder.path).encode(text) == tokenizer.encode(text).ids


def test_space_prefix(tmp_path: Path) -> None:
    metadata = shape_metadata("llama") | sentencepiece_metadata()
    metadata["tokenizer.ggml.add_space_prefix"] = True
    tensors = random_tensors(len(metadata["tokenizer.ggml.tokens"]))
    write_gguf(tmp_path / "toy.gguf", "llama", tensors, metadata)
    folder = import_gguf(tmp_path / "toy.gguf", tmp_path / "toy")
    tokenizer = Tokenizer.from_file(str(folder.path / "tokenizer.json"))
    assert tokenizer.encode("the").tokens == ["<s>", "▁the"]
    assert tokenizer.decode(tokenizer.encode("the").ids) == "the"


@pytest.mark.parametrize(
    ("metadata", "ends"),
    [
        ({}, [2]),
        ({"tokenizer.ggml.eos_token_id": 0}, [0, 2]),  # the template ends turns with <|im_end|>
        ({"tokenizer.ggml.eos_token_id": 0, "tokenizer.chat_template": None}, [0]),
        ({"tokenizer.ggml.eos_token_id": 0, "tokenizer.ggml.eot_token_id": 1}, [0, 1]),
        ({"tokenizer.ggml.eos_token_id": None, "tokenizer.chat_template": None}, None),
    ],
)
def test_end_tokens(tmp_path: Path, metadata: dict[str, Any], ends: list[int] | None) -> None:
    toy_llama(tmp_path / "toy.gguf", metadata=metadata)
    folder = import_gguf(tmp_path / "toy.gguf", tmp_path / "toy")
    generation = json.loads((folder.path / "generation_config.json").read_text())
    assert generation.get("eos_token_id") == ends


@pytest.mark.parametrize(
    ("metadata", "named"),
    [
        ({"tokenizer.ggml.pre": "deepseek-v9"}, "deepseek-v9"),
        ({"tokenizer.ggml.model": "rwkv"}, "rwkv"),
        ({"llama.expert_count": 8}, "mixture of experts"),
        ({"split.count": 3}, "3 parts"),
        ({"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 2.0}, "longrope"),
        ({"llama.attention.value_length": 16}, "head sizes 32 and 16"),
        ({"llama.rope.dimension_count": 16}, "16 rotate"),
    ],
)
def test_what_cannot_be_converted_is_named(tmp_path: Path, metadata: dict[str, Any], named: str) -> None:
    toy_llama(tmp_path / "toy.gguf", metadata=metadata)
    with pytest.raises(UnsupportedModel, match=named):
        import_gguf(tmp_path / "toy.gguf", tmp_path / "toy")
    assert not (tmp_path / "toy").exists()


def test_unknown_architecture_is_named(tmp_path: Path) -> None:
    metadata = shape_metadata("mamba") | byte_level_metadata()
    write_gguf(tmp_path / "toy.gguf", "mamba", {}, metadata)
    with pytest.raises(UnsupportedModel, match="mamba"):
        import_gguf(tmp_path / "toy.gguf", tmp_path / "toy")


def test_a_tensor_without_a_place_is_named(tmp_path: Path) -> None:
    toy_llama(tmp_path / "toy.gguf", raw={"blk.0.attn_q.bias": np.zeros(128, np.float32)})
    with pytest.raises(UnsupportedModel, match=r"blk\.0\.attn_q\.bias"):
        import_gguf(tmp_path / "toy.gguf", tmp_path / "toy")


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    metadata = shape_metadata("llama") | byte_level_metadata()
    tensors = random_tensors(len(metadata["tokenizer.ggml.tokens"]))
    del tensors["model.layers.1.mlp.up_proj.weight"]
    write_gguf(tmp_path / "toy.gguf", "llama", tensors, metadata)
    with pytest.raises(ModelError, match=r"blk\.1\.ffn_up\.weight"):
        import_gguf(tmp_path / "toy.gguf", tmp_path / "toy")


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    metadata = shape_metadata("llama") | byte_level_metadata()
    tensors = random_tensors(len(metadata["tokenizer.ggml.tokens"]))
    tensors["model.norm.weight"][3] = np.nan
    write_gguf(tmp_path / "toy.gguf", "llama", tensors, metadata)
    with pytest.raises(ModelError, match="not finite"):
        import_gguf(tmp_path / "toy.gguf", tmp_path / "toy")
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_an_import_that_breaks_off_leaves_nothing_and_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy_llama(tmp_path / "toy.gguf")
    (tmp_path / ".toy.partial").mkdir()  # of a process that was killed
    with monkeypatch.context() as patch:
        patch.setattr(gguf_import, "write_shards", _fail)
        with pytest.raises(OSError, match="disk full"):
            import_gguf(tmp_path / "toy.gguf", tmp_path / "toy")
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    assert import_gguf(tmp_path / "toy.gguf", tmp_path / "toy").weights


def test_an_existing_target_is_left_alone(tmp_path: Path) -> None:
    toy_llama(tmp_path / "toy.gguf")
    (tmp_path / "toy").mkdir()
    with pytest.raises(ModelError, match="exists"):
        import_gguf(tmp_path / "toy.gguf", tmp_path / "toy")
    assert not list((tmp_path / "toy").iterdir())


def test_progress_is_told_to_the_end(tmp_path: Path) -> None:
    toy_llama(tmp_path / "toy.gguf")
    told: list[tuple[str, int, int]] = []
    import_gguf(tmp_path / "toy.gguf", tmp_path / "toy", lambda *step: told.append(step))
    done = [step[1] for step in told]
    assert done == sorted(done)
    assert told[-1][0] == "importing toy"
    assert told[-1][1] == told[-1][2]


def _fail(*_arguments: object) -> None:
    raise OSError("disk full")
