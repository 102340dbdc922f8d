"""Each family against transformers' own implementation, at toy size with random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tests.runtimes.torch.conftest import Toy
from tests.runtimes.torch.toys import TOYS, chunk_of, load_toy, prefill, toy_tokens
from torch import Tensor
from torch.nn import Module
from transformers import PreTrainedModel
from transformers.models.llama import modeling_llama

from dormouse.domain.cache_spec import KVFormat
from dormouse.domain.plan import Plan
from dormouse.runtimes.torch.quantization import dequantize, quantize

LENGTH = 75
PAGES = (5, 3, 11, 0, 7)
OTHER_PAGES = (1, 2, 4, 6, 8)


def expected(model: PreTrainedModel, tokens: tuple[int, ...]) -> NDArray[np.float32]:
    with torch.no_grad():
        logits: NDArray[np.float32] = model(torch.tensor([tokens])).logits[0].numpy()
    return logits


@pytest.mark.usefixtures("any_kernels")
@pytest.mark.parametrize("name", TOYS)
def test_prefill_and_decode_match_transformers(name: str, toy: Callable[[str], Toy]) -> None:
    folder, model = toy(name)
    tokens = toy_tokens(LENGTH)
    reference = expected(model, tokens)
    runtime = load_toy(folder)
    chunked = prefill(runtime, tokens, PAGES, [40, 17, 10, 1])
    ends = [40, 57, 67, *range(68, LENGTH + 1)]
    np.testing.assert_allclose(np.stack(chunked), reference[np.array(ends) - 1], atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("any_kernels")
@pytest.mark.parametrize("name", ["mistral-sliding", "qwen3", "gemma3"])
def test_a_batch_of_prefill_and_decode_matches_transformers(name: str, toy: Callable[[str], Toy]) -> None:
    folder, model = toy(name)
    runtime = load_toy(folder)
    first, second = toy_tokens(LENGTH), toy_tokens(33, seed=1)
    prefill(runtime, first[:-1], PAGES, [LENGTH])
    plan = Plan((chunk_of(first, LENGTH - 1, LENGTH, PAGES), chunk_of(second, 0, 33, OTHER_PAGES)))
    logits = runtime.forward(plan)
    wanted = np.stack((expected(model, first)[-1], expected(model, second)[-1]))
    np.testing.assert_allclose(logits, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
def test_bf16_stays_near_fp32(name: str, toy: Callable[[str], Toy]) -> None:
    folder, model = toy(name)
    tokens = toy_tokens(LENGTH)
    runtime = load_toy(folder, KVFormat.BF16, "bf16")
    reference = expected(model, tokens)[-1]
    logits = prefill(runtime, tokens, PAGES, [LENGTH])[0]
    assert np.abs(logits - reference).max() < 0.05 * np.abs(reference).max()


@pytest.mark.usefixtures("any_kernels")
@pytest.mark.parametrize("kv_format", [KVFormat.BF16, KVFormat.Q8, KVFormat.K8V4, KVFormat.Q4])
def test_attention_sees_the_rounded_keys_and_values(
    kv_format: KVFormat, toy: Callable[[str], Toy], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, model = toy("llama-tied-heads-of-64")
    tokens = toy_tokens(LENGTH)
    eager = modeling_llama.eager_attention_forward

    def eager_on_rounded(
        module: Module, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **more: Any
    ) -> Any:
        k_bits, v_bits = kv_format.bits
        return eager(module, query, rounded(key, k_bits), rounded(value, v_bits), *rest, **more)

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", eager_on_rounded)
    logits = prefill(load_toy(folder, kv_format), tokens, PAGES, [LENGTH])[0]
    np.testing.assert_allclose(logits, expected(model, tokens)[-1], atol=2e-3)


def rounded(x: Tensor, bits: int) -> Tensor:
    if bits == 16:
        return x.bfloat16().float()
    return dequantize(*quantize(x, bits, 64), bits, 64)
