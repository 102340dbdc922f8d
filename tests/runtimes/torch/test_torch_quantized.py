"""Quantized weights in a runtime: whole native layers against single kernels, and the choice of bits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tests.runtimes.torch.toys import BLOCK, save_toy

from dormouse.domain.cache_spec import KVFormat
from dormouse.domain.errors import ModelError
from dormouse.domain.plan import Chunk, Plan
from dormouse.runtimes.base import Logits
from dormouse.runtimes.torch.runtime import TorchRuntime
from dormouse.runtimes.torch.selection import linear_maker

native_layer = pytest.importorskip("dormouse.runtimes.torch.native_layer", reason="no native module")
quantized = pytest.importorskip("dormouse.runtimes.torch.quantized_linear")

TOKENS = tuple((5 * i + 3) % 89 for i in range(45))
WIDTHS = {"intermediate_size": 128}


@pytest.fixture(autouse=True)
def _native_kernels(_reference_kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DORMOUSE_NO_NATIVE")


def load(
    folder: Path, weights: str, dtype: str = "bf16", kv_format: KVFormat = KVFormat.K8V4
) -> TorchRuntime:
    return TorchRuntime.load(
        folder,
        name="toy",
        kv_format=kv_format,
        block_size=BLOCK,
        arena_tokens=8 * BLOCK,
        dtype=dtype,
        weights=weights,
    )


def run(runtime: TorchRuntime) -> tuple[Logits, list[bytes]]:
    pages = (3, 1, 5)
    first = runtime.forward(Plan((Chunk(TOKENS[:40], 0, pages, 2),))).copy()
    rest = runtime.forward(Plan((Chunk(TOKENS[40:], 40, pages, 3), Chunk(TOKENS[:7], 0, (0,), 1))))
    return np.concatenate((first, rest)), [runtime.read_page(page, BLOCK) for page in pages[:2]]


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("toy", ["llama-all-biases", "smollm3", "qwen2-sliding", "qwen3", "gemma3"])
def test_a_native_layer_gives_the_bits_of_its_kernels(
    toy: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_toy(toy, tmp_path, changes=WIDTHS)
    whole, pages = run(load(tmp_path, "int8", dtype))
    made: list[object] = []
    fits = native_layer.NativeLayer.fits
    monkeypatch.setattr(
        native_layer.NativeLayer, "fits", staticmethod(lambda layer: made.append(fits(layer)))
    )
    single, single_pages = run(load(tmp_path, "int8", dtype))
    assert made, "layers were bound one by one"
    assert all(made), "the whole layers were native before"
    np.testing.assert_array_equal(whole, single)
    assert pages == single_pages


@pytest.mark.parametrize("changes", [WIDTHS, {}], ids=["groups", "no group divides the MLP"])
def test_quantized_weights_stay_near_the_full_ones(changes: dict[str, int], tmp_path: Path) -> None:
    save_toy("llama", tmp_path, changes=changes | {"initializer_range": 0.05})
    full, eight, four = (
        run(load(tmp_path, weights, "fp32", KVFormat.F32))[0] for weights in ("bf16", "int8", "int4")
    )
    size = np.linalg.norm(full)
    assert 0 < np.linalg.norm(eight - full) < 0.03 * size
    assert np.linalg.norm(eight - full) < np.linalg.norm(four - full) < 0.25 * size


def test_auto_takes_four_bits_only_where_these_are_the_origin() -> None:
    make = linear_maker("auto", torch.device("cpu"))
    torch.manual_seed(0)
    linear = make(torch.randn(64, 64), None)
    assert isinstance(linear, quantized.QuantizedLinear)
    assert linear.bits == 8
    levels = torch.randint(0, 16, (64, 64)).float()
    levels[:, ::32], levels[:, 1::32] = 0, 15
    linear = make((levels * 0.01 - 0.07).bfloat16(), None)
    assert isinstance(linear, quantized.QuantizedLinear)
    assert linear.bits == 4
    assert linear.nbytes == 64 * 64 * 5 // 8


def test_quantized_weights_without_the_native_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DORMOUSE_NO_NATIVE", "1")
    cpu = torch.device("cpu")
    assert not isinstance(linear_maker("auto", cpu)(torch.randn(32, 32), None), quantized.QuantizedLinear)
    with pytest.raises(ModelError, match=r"int8 needs the native kernels.*--weights auto"):
        linear_maker("int8", cpu)
    with pytest.raises(ModelError, match="int9"):
        linear_maker("int9", cpu)
