"""The arena that a server gets when nobody says how large."""

from __future__ import annotations

from types import SimpleNamespace

import psutil
import pytest

from dormouse.domain.cache_spec import CacheSpec, KVFormat
from dormouse.models.runtimes import default_arena

CACHE = CacheSpec.for_heads(KVFormat.BF16, 128, num_layers=1, num_kv_heads=1, k_head_dim=64, v_head_dim=64)


@pytest.fixture
def free_tokens(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """The machine has free memory for so many tokens of KV."""
    tokens = int(request.param)
    memory = SimpleNamespace(available=tokens * CACHE.token_nbytes)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    return tokens


@pytest.mark.parametrize(
    ("free_tokens", "context", "expected"),
    [
        pytest.param(1_000_000, 8192, 250_000, id="a quarter of the memory"),
        pytest.param(100_000_000, 8192, 32 * 8192, id="no more than many agents use"),
        pytest.param(50_000, 32_768, 32_768 + 128, id="one full context, and the page that is kept back"),
        pytest.param(20_000, 32_768, 20_000, id="all that there is"),
        pytest.param(10, 32_768, 256, id="two blocks, whatever there is"),
    ],
    indirect=["free_tokens"],
)
def test_the_default_arena(free_tokens: int, context: int, expected: int) -> None:
    assert free_tokens
    assert default_arena(CACHE.block_size, CACHE.token_nbytes, context, weights_nbytes=0) == expected
