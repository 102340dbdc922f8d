"""Which model a name means, in order, and what is said when there is none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import httpx
import pytest
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

from dormouse.domain.errors import DormouseError, ModelError, ModelFilesMissing, ModelNotFound
from dormouse.models import sources
from dormouse.models.folder import ModelFolder, open_folder
from dormouse.models.sources import HUB_PATTERNS, import_target, list_models, resolve


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **_options: Any) -> str:
        raise AssertionError(f"asked for {arguments}")

    monkeypatch.setattr(sources, "snapshot_download", refuse)
    monkeypatch.setattr(sources, "embedded_model", refuse)


@pytest.fixture
def toy(models_dir: Path, byte_level_folder: ModelFolder) -> Path:
    return Path(shutil.copytree(byte_level_folder.path, models_dir / "toy"))


@pytest.mark.usefixtures("no_network")
def test_a_folder_comes_first(tmp_path: Path, toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve(str(toy), tmp_path).path == toy
    # Even one that is called like something else.
    shutil.copytree(toy, tmp_path / "smollm2")
    shutil.copytree(toy, tmp_path / "owner" / "model")
    monkeypatch.chdir(tmp_path)
    assert resolve("smollm2", tmp_path / "none").path == tmp_path / "smollm2"
    assert resolve("owner/model", tmp_path / "none").path == tmp_path / "owner" / "model"


@pytest.mark.usefixtures("no_network")
def test_imported_models_go_by_name(models_dir: Path, toy: Path) -> None:
    folder = resolve("toy", models_dir)
    assert (folder.path, folder.name) == (toy, "toy")
    assert folder.config["model_type"] == "llama"
    assert [path.name for path in folder.weights] == ["model.safetensors"]
    assert folder.weights_nbytes == (toy / "model.safetensors").stat().st_size
    assert "tokenizer_config.json" in folder.files


def test_the_embedded_model_goes_by_its_name(
    models_dir: Path, toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []

    def embedded(directory: Path, _on_progress: object) -> ModelFolder:
        asked.append(directory)
        return open_folder(toy)

    monkeypatch.setattr(sources, "embedded_model", embedded)
    assert resolve("smollm2", models_dir).path == toy
    assert asked == [models_dir]


def test_hub_ids_fetch_settings_and_safetensors_only(
    models_dir: Path, toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, dict[str, Any]]] = []

    def download(repo: str, **options: Any) -> str:
        asked.append((repo, options))
        return str(toy)

    monkeypatch.setattr(sources, "snapshot_download", download)
    folder = resolve("owner/model", models_dir, revision="v2")
    assert folder.name == "owner/model"
    assert asked == [("owner/model", {"revision": "v2", "allow_patterns": list(HUB_PATTERNS)})]
    assert not any(pattern.endswith((".bin", ".pt", ".py", "*")) for pattern in HUB_PATTERNS)


def response(status: int) -> Any:
    # The hub names its own HTTP library here, which differs by release.
    return httpx.Response(status, request=httpx.Request("GET", "https://huggingface.co/owner/model"))


@pytest.mark.parametrize(
    ("raised", "error", "said"),
    [
        (LocalEntryNotFoundError("no connection"), ModelFilesMissing, "connect to the network"),
        (OSError("disk full"), ModelFilesMissing, "disk full"),
        (httpx.ConnectError("name not known"), ModelFilesMissing, "name not known"),
        (RepositoryNotFoundError("404", response=response(404)), ModelNotFound, "spelling"),
        (GatedRepoError("403", response=response(403)), ModelNotFound, "accept its terms"),
    ],
)
def test_what_the_hub_refuses_is_explained(
    models_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    raised: Exception,
    error: type[DormouseError],
    said: str,
) -> None:
    def download(*_arguments: Any, **_options: Any) -> str:
        raise raised

    monkeypatch.setattr(sources, "snapshot_download", download)
    with pytest.raises(error, match=said):
        resolve("owner/model", models_dir)


@pytest.mark.usefixtures("no_network")
def test_a_gguf_file_has_to_be_imported(models_dir: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"dormouse models import some/model\.GGUF"):
        resolve("some/model.GGUF", models_dir)


@pytest.mark.usefixtures("no_network", "toy")
@pytest.mark.parametrize(
    "reference", ["nothing", "../toy", "a/b/c", "toy\0", "x" * 5000, "~nobody/x/y", ".hidden", "toy/.."]
)
def test_what_is_nothing_is_answered_with_what_there_is(
    models_dir: Path, reference: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotFound, match=r"one of .*models \(toy\)"):
        resolve(reference, models_dir)


def test_what_lacks_is_listed(toy: Path) -> None:
    (toy / "tokenizer.json").unlink()
    (toy / "model.safetensors").unlink()
    (toy / "pytorch_model.bin").touch()
    with pytest.raises(ModelFilesMissing, match=r"tokenizer\.json, \*\.safetensors"):
        open_folder(toy)
    (toy / "config.json").unlink()
    with pytest.raises(ModelFilesMissing, match=r"config\.json"):
        open_folder(toy)


def test_shards_of_an_index_must_be_there(toy: Path) -> None:
    index = toy / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}))
    with pytest.raises(ModelFilesMissing, match=r"model-2\.safetensors"):
        open_folder(toy)
    (toy / "model-2.safetensors").touch()
    (toy / "consolidated.safetensors").touch()
    assert [path.name for path in open_folder(toy).weights] == ["model-2.safetensors", "model.safetensors"]


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/passwd", "weights.bin", "a/b.safetensors"])
def test_an_index_cannot_name_files_elsewhere(toy: Path, shard: str) -> None:
    (toy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(ModelError, match="no safetensors file beside it"):
        open_folder(toy)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b"[" * 100_000])
def test_a_damaged_config_is_named(toy: Path, content: bytes) -> None:
    (toy / "config.json").write_bytes(content)
    with pytest.raises(ModelError, match=r"config\.json"):
        open_folder(toy)


def test_listing_shows_whole_models_by_name(models_dir: Path, toy: Path) -> None:
    shutil.copytree(toy, models_dir / "another")
    shutil.copytree(toy, models_dir / ".unfinished.partial")
    (models_dir / "half").mkdir()
    (models_dir / "a-file").touch()
    assert [folder.name for folder in list_models(models_dir)] == ["another", "toy"]
    assert list_models(models_dir / "none") == []


def test_import_names(models_dir: Path) -> None:
    assert import_target("my-model.v2", models_dir) == models_dir / "my-model.v2"
    for name in ("", "..", "a/b", ".hidden", "smollm2", "a b"):
        with pytest.raises(ModelError, match="cannot be called"):
            import_target(name, models_dir)
