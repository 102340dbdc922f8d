"""Every family against mlx-lm's own caches and against the torch runtime, with K and V kept exactly."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from tests.runtimes.mlx.mlx_toys import chunk, close_to, load_alone, load_mlx, our_logits, own_logits
from tests.runtimes.torch.toys import load_toy, save_toy, toy_tokens

from dormouse.domain.plan import Plan

FAMILIES = (
    "llama",
    "llama-tied-heads-of-64",
    "llama-all-biases",
    "llama3-rope",
    "llama-linear-rope",
    "llama-yarn-rope",
    "smollm3",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma3",
)
CHANGES = {"qwen2": {"head_dim": 16}}  # mlx-lm's qwen2 has heads of hidden size / heads
PAGES = (3, 1, 7, 5, 2)
TEXT = toy_tokens(70)
SIZES = (33, 9, 1)


@pytest.fixture(params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    save_toy(request.param, tmp_path, changes=CHANGES.get(request.param))
    return tmp_path


def test_logits_are_those_of_mlx_lm_and_of_torch(folder: Path) -> None:
    """Past every window, in chunks and token by token."""
    runtime, torch = load_mlx(folder), load_toy(folder)
    got = our_logits(runtime, TEXT, SIZES, PAGES)
    close_to(got, own_logits(load_alone(folder), TEXT, SIZES), 1e-5)
    close_to(got, our_logits(torch, TEXT, SIZES, PAGES), 1e-3)
    assert runtime.spec == torch.spec
    assert runtime.cache == torch.cache
    runtime.close()
    torch.close()


def test_sequences_of_any_length_share_a_step(folder: Path) -> None:
    """Four sequences join and leave; each gets what it gets alone, guesses of different lengths included."""
    runtime, loaded = load_mlx(folder), load_alone(folder)
    texts = [toy_tokens(60, seed) for seed in range(4)]
    tables = [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10, 11), (12, 13, 14, 15)]
    done = [0, 0, 0, 0]
    steps = [
        {0: 30},
        {0: 1, 1: 41},
        {0: 1, 1: 1, 2: 3},
        {0: 1, 1: 4, 2: 1, 3: 20},
        {1: 1, 3: 1},
        {0: 2, 3: 1},
    ]
    for step in steps:
        chunks = [chunk(texts[who], done[who], done[who] + size, tables[who]) for who, size in step.items()]
        logits = runtime.forward(Plan(tuple(chunks)))
        for row, (who, size) in zip(logits, step.items(), strict=True):
            done[who] += size
            close_to(row, own_logits(loaded, texts[who][: done[who]], (60,))[-1])
    runtime.close()


def test_greedy_words_are_those_of_mlx_lm(folder: Path) -> None:
    runtime, loaded = load_mlx(folder), load_alone(folder)
    ours, theirs = list(TEXT[:20]), list(TEXT[:20])
    for _ in range(20):
        ours.append(int(np.argmax(our_logits(runtime, ours, (20, 1), PAGES)[-1])))
        theirs.append(int(np.argmax(own_logits(loaded, theirs, (20, 1))[-1])))
    assert ours == theirs
    runtime.close()


def test_weights_of_4_bits(tmp_path: Path) -> None:
    """As mlx_lm.convert writes them."""
    plain, folder = tmp_path / "plain", tmp_path / "four"
    save_toy("llama", plain, changes={"intermediate_size": 128})
    loaded = load_alone(plain)
    nn.quantize(loaded.module, group_size=64, bits=4)
    folder.mkdir()
    config = json.loads((plain / "config.json").read_bytes())
    quantization = {"group_size": 64, "bits": 4}
    config |= {"quantization": quantization, "quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config))
    weights = dict(tree_flatten(loaded.module.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    runtime = load_mlx(folder)
    close_to(our_logits(runtime, TEXT, SIZES, PAGES), own_logits(loaded, TEXT, SIZES), 1e-5)
    assert runtime.weights_nbytes < loaded.nbytes * 1.01
    other = load_mlx(plain)
    assert runtime.spec.fingerprint != other.spec.fingerprint
    runtime.close()
    other.close()
