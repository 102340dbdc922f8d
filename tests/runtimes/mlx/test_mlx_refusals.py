"""What cannot be served is refused by a typed error that names the cause."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from tests.runtimes.mlx.mlx_toys import load_mlx
from tests.runtimes.torch.toys import save_toy

from dormouse.domain.cache_spec import KVFormat
from dormouse.domain.errors import ModelError, ModelFilesMissing, UnsupportedModel
from dormouse.runtimes.mlx import model as model_module


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | changes))


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    save_toy("llama", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("toy", "words"),
    [
        ("mistral-sliding", "full_attention"),
        ("qwen2-sliding", r"sliding windows|cannot load"),
        ("llama-yarn-magnitude", "YaRN"),
    ],
)
def test_what_mlx_lm_would_compute_otherwise(toy: str, words: str, tmp_path: Path) -> None:
    changes = {"head_dim": 16} if toy.startswith("qwen2") else None
    save_toy(toy, tmp_path, changes=changes)
    with pytest.raises(UnsupportedModel, match=words):
        load_mlx(tmp_path)


def test_recurrent_state(tmp_path: Path) -> None:
    from mlx_lm.models import mamba

    config = {
        "model_type": "mamba",
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 64,
        "state_size": 8,
        "num_hidden_layers": 2,
        "conv_kernel": 4,
        "use_bias": False,
        "use_conv_bias": True,
        "time_step_rank": 4,
        "max_position_embeddings": 128,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    mamba_model = mamba.Model(mamba.ModelArgs.from_dict(config))
    mx.save_safetensors(str(tmp_path / "model.safetensors"), dict(tree_flatten(mamba_model.parameters())))
    with pytest.raises(UnsupportedModel, match="ArraysCache"):
        load_mlx(tmp_path)


def test_a_family_that_mlx_lm_does_not_have(llama: Path) -> None:
    change_config(llama, model_type="no-such-family")
    with pytest.raises(UnsupportedModel, match="no-such-family not supported"):
        load_mlx(llama)


@pytest.mark.parametrize(
    "quantization",
    [
        {"quantization_config": {"quant_method": "bitsandbytes"}},
        {"quantization": {"mode": "q5_k", "bits": 5, "group_size": 64}},
        {"quantization": {"bits": 4}},
    ],
)
def test_an_unknown_quantization(llama: Path, quantization: dict[str, object]) -> None:
    change_config(llama, **quantization)
    with pytest.raises(UnsupportedModel, match=r"quantiz|group_size"):
        load_mlx(llama)


def test_a_tensor_of_another_shape(llama: Path) -> None:
    change_config(llama, hidden_size=96)
    with pytest.raises(UnsupportedModel, match="shape"):
        load_mlx(llama)


def test_files_that_are_not_there(llama: Path) -> None:
    (llama / "model.safetensors").unlink()
    with pytest.raises(ModelFilesMissing):
        load_mlx(llama)


def test_a_torn_file(llama: Path) -> None:
    path = llama / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UnsupportedModel):
        load_mlx(llama)


def test_code_in_a_model_folder_is_not_run(llama: Path) -> None:
    (llama / "mine.py").write_text("raise SystemExit('it ran')")
    change_config(llama, model_file="mine.py")
    with pytest.raises(UnsupportedModel, match="custom module"):
        load_mlx(llama)


def test_heads_that_no_group_divides(tmp_path: Path) -> None:
    save_toy("llama", tmp_path, changes={"head_dim": 16})
    with pytest.raises(UnsupportedModel, match="--kv-format bf16"):
        load_mlx(tmp_path, KVFormat.Q8)
    load_mlx(tmp_path, KVFormat.BF16).close()


def test_more_memory_than_there_is(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Little:
        available = 1000

    monkeypatch.setattr(model_module.psutil, "virtual_memory", Little)
    with pytest.raises(ModelError, match="GiB"):
        load_mlx(llama)


def test_an_arena_beyond_all_memory(llama: Path) -> None:
    with pytest.raises(ModelError, match="fewer arena tokens"):
        load_mlx(llama, num_pages=1 << 44)


@pytest.mark.parametrize(("found", "words"), [("0.20.1", "too old"), (None, "not installed")])
def test_an_mlx_that_is_too_old(
    llama: Path, monkeypatch: pytest.MonkeyPatch, found: str | None, words: str
) -> None:
    def version(package: str) -> str:
        if found is None:
            raise model_module.PackageNotFoundError(package)
        return found

    monkeypatch.setattr(model_module, "version", version)
    with pytest.raises(ModelError, match=words):
        load_mlx(llama)


def test_an_unknown_dtype(llama: Path) -> None:
    with pytest.raises(ModelError, match="fp32"):
        load_mlx(llama, dtype="fp8")


def test_importing_mlx_lm_leaves_the_limit_of_open_files(llama: Path) -> None:
    load_mlx(llama).close()
    assert resource.getrlimit(resource.RLIMIT_NOFILE) != (2048, 4096)
