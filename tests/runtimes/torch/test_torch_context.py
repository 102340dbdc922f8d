"""Contexts beyond the trained one: transformers' numbers, the same bits however cut, KV of their own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.runtimes.torch.test_torch_families import expected
from tests.runtimes.torch.toys import BLOCK, load_toy, prefill, save_toy, stored, toy_tokens

from dormouse.domain.cache_spec import KVFormat
from dormouse.domain.errors import ModelError
from dormouse.runtimes.context import Context, Scaling
from dormouse.runtimes.decoder_config import DecoderConfig
from dormouse.runtimes.rope import Rope

TRAINED, FACTOR = 64, 4
LENGTH = 200
PAGES = (5, 3, 11, 0, 7, 9, 1, 2, 4, 12, 13, 6, 10)
LLAMA: Mapping[str, Any] = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 100,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": TRAINED,
    "rope_theta": 500.0,
}


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy that was trained for 64 tokens."""
    folder = tmp_path_factory.mktemp("short")
    save_toy("llama", folder, changes={"max_position_embeddings": TRAINED, "rope_theta": 10_000.0})
    return folder


def config(**changes: object) -> DecoderConfig:
    return DecoderConfig.from_hf({**LLAMA, **changes})


def test_as_trained_nothing_changes() -> None:
    assert Context().fit(config()) == (config(), TRAINED)


def test_a_shorter_context_is_a_bound_and_computes_the_same() -> None:
    assert Context(length=50).fit(config()) == (config(), 50)


@pytest.mark.parametrize("factor", [1.3, 1.7, 2.01, 3.99])
def test_a_factor_alone_reaches_as_far_as_it_can(factor: float) -> None:
    assert Context(scaling="yarn", factor=factor).fit(config())[1] == int(TRAINED * factor)


def test_a_longer_context_needs_scaling() -> None:
    with pytest.raises(ModelError, match="--rope-scaling yarn"):
        Context(length=65).fit(config())


@pytest.mark.parametrize(
    ("context", "length", "factor"),
    [
        (Context(256, "yarn"), 256, 4.0),
        (Context(96, "yarn"), 96, 1.5),
        (Context(None, "yarn", 2.0), 128, 2.0),
        (Context(100, "yarn", 2.0), 100, 2.0),
    ],
)
def test_the_factor_is_as_large_as_the_length_needs_unless_given(
    context: Context, length: int, factor: float
) -> None:
    scaled, fitted = context.fit(config())
    assert fitted == length
    assert {layer.rope for layer in scaled.layers} == {Rope.yarn(500.0, factor, TRAINED)}


def test_scaling_that_is_not_needed_changes_nothing() -> None:
    assert Context(40, "linear").fit(config()) == (config(), 40)


@pytest.mark.parametrize(
    ("context", "message"),
    [
        (Context(None, "yarn"), "needs --context-length"),
        (Context(256, "yarn", 2.0), "reaches 128 tokens, not 256; leave it out, or give at least 4"),
        (Context(None, "none", 2.0), "only with --rope-scaling"),
    ],
)
def test_what_cannot_be_is_refused_with_the_numbers(context: Context, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        context.fit(config())


def test_a_rope_that_is_scaled_already_is_left_alone() -> None:
    own = {"rope_type": "linear", "factor": 2.0}
    with pytest.raises(ModelError, match="scaled already"):
        Context(256, "yarn").fit(config(rope_scaling=own))


def test_layers_that_see_a_window_only_keep_their_rope() -> None:
    sliding = {"model_type": "mistral", "sliding_window": 16}
    scaled, _ = Context(256, "yarn").fit(config(**sliding))
    assert scaled == config(**sliding)


@pytest.mark.parametrize("scaling", ["linear", "yarn"])
def test_ropes_are_those_that_a_config_would_ask_for(scaling: Scaling) -> None:
    asked = {"rope_type": scaling, "factor": 4.0, "original_max_position_embeddings": TRAINED}
    if scaling == "linear":
        del asked["original_max_position_embeddings"]
    by_config = config(rope_scaling=asked)
    by_flag, _ = Context(4 * TRAINED, scaling).fit(config())
    assert [layer.rope for layer in by_flag.layers] == [layer.rope for layer in by_config.layers]


@pytest.mark.usefixtures("any_kernels")
@pytest.mark.parametrize("scaling", ["linear", "yarn"])
def test_logits_beyond_the_trained_context_match_transformers(
    scaling: Scaling, short: Path, tmp_path: Path
) -> None:
    rope = {"rope_type": scaling, "rope_theta": 10_000.0, "factor": float(FACTOR)}
    if scaling == "yarn":
        rope["original_max_position_embeddings"] = TRAINED
    model = save_toy(
        "llama", tmp_path, changes={"max_position_embeddings": FACTOR * TRAINED, "rope_parameters": rope}
    )
    runtime = load_toy(short, context=Context(FACTOR * TRAINED, scaling))
    tokens = toy_tokens(LENGTH)
    got = prefill(runtime, tokens, PAGES, [90, 70, 39, 1])
    reference = expected(model, tokens)
    np.testing.assert_allclose(np.stack(got), reference[np.array([89, 159, 198, 199])], atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("any_kernels")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_any_chunking_gives_the_same_bits_beyond_the_trained_context(dtype: str, short: Path) -> None:
    runtime = load_toy(short, KVFormat.K8V4, dtype, context=Context(FACTOR * TRAINED, "yarn"))
    tokens = toy_tokens(LENGTH)

    def result(pages: tuple[int, ...], sizes: list[int]) -> tuple[list[bytes], bytes]:
        last = prefill(runtime, tokens, pages, sizes)[-1].tobytes()
        return stored(runtime, pages, LENGTH), last

    whole = result(PAGES, [LENGTH])
    for sizes in ([63, 1, 1, 64], [BLOCK], [1]):
        assert result(PAGES[::-1], sizes) == whole, sizes


def test_kv_of_another_scaling_has_another_name(short: Path) -> None:
    contexts = {
        "as trained": Context(),
        "bounded": Context(32),
        "yarn 4": Context(256, "yarn"),
        "yarn 4, bounded": Context(200, "yarn", 4.0),
        "yarn 2": Context(128, "yarn"),
        "linear 4": Context(256, "linear"),
    }
    names = {}
    for label, context in contexts.items():
        runtime = load_toy(short, context=context)
        names[label] = runtime.spec.fingerprint
        assert runtime.spec.context_length == (context.length or TRAINED)
        runtime.close()
    assert names["bounded"] == names["as trained"]
    assert names["yarn 4, bounded"] == names["yarn 4"]
    assert len(set(names.values())) == 4


def test_a_chunk_past_the_context_is_caught(short: Path) -> None:
    runtime = load_toy(short, context=Context(100, "yarn"))
    with pytest.raises(AssertionError):
        prefill(runtime, toy_tokens(101), PAGES, [101])
