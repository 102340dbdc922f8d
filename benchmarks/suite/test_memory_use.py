"""What agents take: bytes of KV, resident memory, pages and disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from benchmarks.conversation import Conversation
from benchmarks.figures import Scale
from benchmarks.resident import Resident
from benchmarks.server import Server, serve
from dormouse.domain.cache_spec import CacheSpec, KVFormat
from dormouse.models.sources import resolve
from dormouse.runtimes.decoder_config import DecoderConfig
from dormouse.settings import Settings

pytestmark = pytest.mark.timeout(600)

BLOCK = 128
ARENA_TOKENS = 2048
HEADER = 8192
"""Most bytes of a block file beside its payload: the header, padded to 4096."""
GROWTH = 1.05
LINES = 24


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("memory") / "data"


@pytest.fixture(scope="module")
def server(data: Path) -> Any:
    """An arena for a part of the agents."""
    with serve(data, "--arena-tokens", str(ARENA_TOKENS)) as server:
        yield server


def text(name: str) -> str:
    """Some 350 tokens."""
    return " ".join(f"{name} saw {n * len(name) % 41} carts in the year {1700 + n}." for n in range(LINES))


def say(http: httpx.Client, name: str, words: str | None = None) -> None:
    talk = Conversation(name)
    talk.say(http, words or text(name), max_tokens=4)
    talk.wait_until_durable(http)


def health(http: httpx.Client) -> dict[str, Any]:
    found: dict[str, Any] = http.get("/health").json()
    return found


def store(http: httpx.Client) -> dict[str, Any]:
    found: dict[str, Any] = http.get("/admin/state").json()["store"]
    return found


def spec(kv_format: KVFormat) -> CacheSpec:
    """Of the served model."""
    folder = resolve("smollm2", Settings().models_dir)
    config = DecoderConfig.from_hf(folder.config)
    return CacheSpec.for_heads(
        kv_format,
        BLOCK,
        num_layers=len(config.layers),
        num_kv_heads=config.num_kv_heads,
        k_head_dim=config.head_dim,
        v_head_dim=config.head_dim,
    )


def test_kv_takes_what_its_format_says(http: httpx.Client, data: Path, figures: dict[str, Any]) -> None:
    """S31: in memory and on disk, and less than half of bf16."""
    say(http, "sized")
    found = health(http)
    page_nbytes = found["memory"]["arena_nbytes"] / found["engine"]["pages_total"]
    files = [file.stat().st_size for file in data.rglob("*.safetensors")]
    plain, quantized = spec(KVFormat.BF16), spec(KVFormat.K8V4)
    assert page_nbytes == quantized.block_nbytes
    assert quantized.token_nbytes < plain.token_nbytes / 2
    assert files
    assert all(quantized.block_nbytes < size <= quantized.block_nbytes + HEADER for size in files)
    figures |= {
        "bytes_per_token": quantized.token_nbytes,
        "bytes_per_token_bf16": plain.token_nbytes,
        "file_bytes_per_token": round(max(files) / BLOCK, 1),
        "weights_mib": round(found["memory"]["weights_nbytes"] / 2**20, 1),
    }


def test_resident_memory_settles(
    server: Server, http: httpx.Client, scale: Scale, figures: dict[str, Any]
) -> None:
    """S31: agents that take turns on an arena too small for them: after the first round memory stays."""
    names = [f"turn-{i}" for i in range(scale(8, 24))]
    process = psutil.Process(server.pid)
    resident = []
    for _ in range(scale(3, 8)):
        for name in names:
            say(http, name)
        resident.append(process.memory_info().rss / 2**20)
    engine = health(http)["engine"]
    weights = health(http)["memory"]["weights_nbytes"] / 2**20
    assert engine["pages_used"] + engine["pages_idle"] <= engine["pages_total"]
    assert engine["disk_tokens"] > 0, "nobody ever had to sleep"
    assert resident[-1] < GROWTH * resident[0]
    figures |= {
        "agents": len(names),
        "resident_mib": [round(size, 1) for size in resident],
        **Resident.of(server.pid).beyond(weights),
    }


def test_a_shared_past_is_stored_once(http: httpx.Client, scale: Scale, figures: dict[str, Any]) -> None:
    """S31: forks, and agents that begin alike, add a tail each."""
    say(http, "root", text("root") + text("again"))
    before = store(http)
    own = http.get("/v1/agents/root").json()["stored_bytes"]
    count = scale(6, 40)
    for i in range(count):
        http.post("/v1/agents/root/fork", json={"name": f"fork-{i}"}).raise_for_status()
    forked = store(http)
    assert forked["num_blocks"] == before["num_blocks"], "a fork stores nothing"
    for i in range(count):
        say(http, f"fork-{i}", f"{text('root')}{text('again')} I am number {i}.")
    after = store(http)
    assert after["num_blocks"] - before["num_blocks"] <= 2 * count, "a tail each, and the block it grew into"
    added = after["blocks_nbytes"] - before["blocks_nbytes"]
    assert added < count * own
    figures |= {"forks": count, "bytes_of_one": own, "bytes_added_by_all": added}


def test_sleeping_agents_take_no_page(http: httpx.Client, scale: Scale, figures: dict[str, Any]) -> None:
    """S31: what sleep says that it released, it has."""
    names = [f"asleep-{i}" for i in range(scale(3, 4))]
    for name in names:
        say(http, name)
    before = health(http)["engine"]
    put = [http.post(f"/v1/agents/{name}/sleep").raise_for_status().json() for name in names]
    after = health(http)["engine"]
    released = sum(row["released_blocks"] for row in put)
    assert {row["state"] for row in put} == {"asleep"}
    assert released >= len(names)
    assert before["pages_idle"] - after["pages_idle"] == released
    assert after["pages_used"] == 0
    figures |= {"agents": len(names), "released_pages": released}
