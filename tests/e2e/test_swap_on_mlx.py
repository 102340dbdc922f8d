"""Models of mlx swapped on a running server: what cannot be loaded is refused, and the old model stays."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from tests.live import strict_server
from tests.models.mlx_folders import QUANTIZATION, change_config, save_mlx_toy

from dormouse.models.folder import ModelFolder

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, smollm2: ModelFolder) -> Path:
    """The embedded model, a quantized toy, and one whose quantization nobody knows."""
    folder = tmp_path_factory.mktemp("models")
    (folder / smollm2.name).symlink_to(smollm2.path)
    vocab = {"vocab_size": smollm2.config["vocab_size"]}
    save_mlx_toy(folder / "toy-4bit", smollm2, "llama", quantization=QUANTIZATION, changes=vocab)
    odd = save_mlx_toy(folder / "odd", smollm2, "llama", changes=vocab)
    change_config(odd, quantization={"group_size": 32, "bits": 4, "mode": "nf4"})
    return folder


@pytest.fixture(scope="module")
def client(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    data = tmp_path_factory.mktemp("swap-on-mlx") / "data"
    flags = ("--models-dir", str(models), "--arena-tokens", "2048")
    # A swap that is refused is logged as an error.
    complaints = ("Warning", "Traceback", "never retrieved", "was destroyed")
    with (
        strict_server(data, *flags, complaints=complaints, runtime="mlx") as server,
        server.client() as http,
    ):
        yield http


def reply(client: httpx.Client) -> str:
    body = {"model": "default", "prompt": "One, two, three,", "max_tokens": 4, "temperature": 0}
    text: str = client.post("/v1/completions", json=body).raise_for_status().json()["choices"][0]["text"]
    return text


def test_a_model_that_mlx_cannot_load_leaves_the_old_one(client: httpx.Client) -> None:
    before = reply(client)
    refused = client.post("/admin/models/swap", json={"model": "odd"})
    assert refused.status_code == 400, refused.text
    assert "nf4" in refused.json()["error"]["message"]
    assert client.get("/v1/models").json()["data"][0]["id"] == "smollm2"
    assert reply(client) == before


def test_a_quantized_model_takes_over_and_gives_back(client: httpx.Client) -> None:
    before = reply(client)
    for model in ("toy-4bit", "smollm2"):
        answer = client.post("/admin/models/swap", json={"model": model})
        assert (answer.status_code, answer.json()["model"]) == (200, model), answer.text
        found = client.get("/v1/models").json()["data"][0]
        assert (found["id"], found["runtime"]) == (model, "mlx")
        reply(client)
    assert reply(client) == before
