"""What the mlx runtime makes of folders: quantized weights, families of mlx-lm's own, and bad ones."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
from tests.models.mlx_folders import QUANTIZATION, change_config, save_mlx_toy

from dormouse.domain.errors import ModelError, UnsupportedModel
from dormouse.domain.plan import Chunk, Plan
from dormouse.models import sources
from dormouse.models.folder import ModelFolder
from dormouse.models.runtimes import choose, load_runtime
from dormouse.models.stack import FolderLoader
from dormouse.runtimes.base import Runtime
from dormouse.settings import Settings
from dormouse.store.block_store import BlockStore

TOKENS = tuple(range(3, 40))
GRANITE = {
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "attention_multiplier": 0.2,
    "logits_scaling": 1.0,
}
"""Its heads divide the hidden size among them."""


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(
        runtime="mlx",
        block_size=16,
        arena_tokens=256,
        models_dir=tmp_path / "models",
        data_dir=tmp_path / "data",
    )


@contextmanager
def loaded(settings: Settings, folder: ModelFolder) -> Iterator[Runtime]:
    runtime = load_runtime(settings, folder)
    try:
        yield runtime
    finally:
        runtime.close()


def logits(runtime: Runtime) -> Any:
    return runtime.forward(Plan((Chunk(TOKENS, 0, (2, 0, 1), 1),)))


def test_quantized_weights_are_taken_as_they_are(
    settings: Settings, byte_level_folder: ModelFolder, tmp_path: Path
) -> None:
    plain = save_mlx_toy(tmp_path / "plain", byte_level_folder, "llama")
    packed = save_mlx_toy(tmp_path / "packed", byte_level_folder, "llama", quantization=QUANTIZATION)
    with loaded(settings, plain) as of_plain, loaded(settings, packed) as of_packed:
        assert of_packed.weights_nbytes < of_plain.weights_nbytes / 2
        assert of_packed.spec.fingerprint != of_plain.spec.fingerprint
        assert np.isfinite(logits(of_packed)).all()
        assert logits(of_packed).shape == (1, of_packed.spec.vocab_size)


def test_a_hugging_face_id_is_served(
    settings: Settings, byte_level_folder: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = save_mlx_toy(tmp_path / "packed", byte_level_folder, "llama", quantization=QUANTIZATION)
    monkeypatch.setattr(sources, "snapshot_download", lambda *_, **__: str(packed.path))
    with BlockStore.open(settings.data_dir, quota_nbytes=10**9) as store:
        loader = FolderLoader(settings, store)
        candidate = loader.find("mlx-community/toy-4bit")
        served = loader.load(candidate)
        try:
            assert served.name == "mlx-community/toy-4bit"
            held = loader.held_nbytes(served)
            assert 0 < held <= candidate.needed_nbytes, "the estimate of a swap covers what is taken"
        finally:
            served.engine.stop(0.0)
            loader.unload(served)


def test_torch_names_the_runtime_that_reads_quantized_weights(
    settings: Settings, byte_level_folder: ModelFolder, tmp_path: Path
) -> None:
    packed = save_mlx_toy(tmp_path / "packed", byte_level_folder, "llama", quantization=QUANTIZATION)
    on_torch = settings.model_copy(update={"runtime": "torch"})
    with pytest.raises(UnsupportedModel, match="--runtime mlx"):
        choose(on_torch).check(packed)
    with pytest.raises(UnsupportedModel, match="--runtime mlx"):
        load_runtime(on_torch, packed)


@pytest.mark.parametrize(
    ("family", "changes"),
    [("llama", {}), ("olmo2", {}), ("granite", GRANITE)],
    ids=["llama", "olmo2", "granite"],
)
def test_what_is_found_out_before_loading_is_so(
    family: str,
    changes: dict[str, Any],
    settings: Settings,
    byte_level_folder: ModelFolder,
    tmp_path: Path,
) -> None:
    """Of a family that torch does not know, too: sizes come from the model, not from its name."""
    folder = save_mlx_toy(tmp_path / family, byte_level_folder, family, changes=changes)
    checked = choose(settings).check(folder)
    with loaded(settings, folder) as runtime:
        assert checked.cache == runtime.cache
        assert checked.context_length == runtime.spec.context_length == 512
        assert checked.weights_nbytes >= runtime.weights_nbytes
        assert np.isfinite(logits(runtime)).all()


def test_state_that_is_no_k_and_v_is_refused_by_name(
    settings: Settings, byte_level_folder: ModelFolder, tmp_path: Path
) -> None:
    changes = {
        "state_size": 4,
        "conv_kernel": 4,
        "use_bias": False,
        "use_conv_bias": True,
        "time_step_rank": 4,
    }
    folder = save_mlx_toy(tmp_path / "mamba", byte_level_folder, "mamba", changes=changes)
    with pytest.raises(UnsupportedModel, match="ArraysCache"):
        choose(settings).check(folder)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"quantization": {"group_size": 32, "bits": 4, "mode": "nf4"}}, "nf4"),
        ({"quantization_config": {"quant_method": "exl2"}}, "exl2"),
        ({"model_type": "no-such-family"}, "no-such-family"),
        ({"num_hidden_layers": 3}, r"layers\.2"),
    ],
    ids=["mode", "method", "family", "layers"],
)
def test_a_folder_that_mlx_cannot_load_says_why(
    changes: dict[str, Any], named: str, settings: Settings, byte_level_folder: ModelFolder, tmp_path: Path
) -> None:
    folder = change_config(save_mlx_toy(tmp_path / "odd", byte_level_folder, "llama"), **changes)
    with pytest.raises(ModelError, match=named):
        choose(settings).check(folder)


def test_weights_beyond_the_memory_are_refused_before_they_are_read(
    settings: Settings, byte_level_folder: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_mlx_toy(tmp_path / "large", byte_level_folder, "llama")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000, total=2000))
    with pytest.raises(ModelError, match="GiB"):
        load_runtime(settings, folder)


@pytest.mark.parametrize(("package", "version"), [("mlx", "0.30.4"), ("mlx-lm", "0.31.9")])
def test_an_mlx_that_is_too_old_is_named(
    package: str,
    version: str,
    settings: Settings,
    byte_level_folder: ModelFolder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = {"mlx": "0.32.4", "mlx-lm": "0.32.2", package: version}
    monkeypatch.setattr("dormouse.runtimes.mlx.model.version", found.__getitem__)
    with pytest.raises(ModelError, match=f"{package} {version} is too old"):
        choose(settings).check(byte_level_folder)


def test_an_mlx_that_does_not_load_is_said_so(
    settings: Settings, byte_level_folder: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Linux without its CPU build: the package is there, its library is not."""
    monkeypatch.delitem(sys.modules, "dormouse.runtimes.mlx.preflight", raising=False)
    monkeypatch.setitem(sys.modules, "dormouse.runtimes.mlx.probe", None)
    with pytest.raises(ModelError, match=r"does not load.*dormouse\[mlx\]"):
        choose(settings).check(byte_level_folder)
