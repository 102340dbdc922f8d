"""Model folders and GGUF files from strangers: a typed error or a model, never anything else."""

from __future__ import annotations

import json
import resource
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import pytest
from hypothesis import given
from tests.models.toy_gguf import (
    random_tensors,
    sentencepiece_metadata,
    shape_metadata,
    toy_llama,
    write_gguf,
)
from tests.security.mutations import damaged, fuzzing, twisted

from dormouse.domain.errors import ModelError
from dormouse.models.chat import ChatModel
from dormouse.models.folder import open_folder
from dormouse.models.gguf_file import GgufFile
from dormouse.models.gguf_import import import_gguf
from dormouse.runtimes.decoder_config import DecoderConfig
from dormouse.runtimes.torch.preflight import check_folder
from dormouse.runtimes.torch.weights import Checkpoint

UINT32, UINT64, STRING, ARRAY = 4, 10, 8, 9


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF file, and beside it the folder that it becomes."""
    place = tmp_path_factory.mktemp("toy")
    toy_llama(place / "toy.gguf")
    import_gguf(place / "toy.gguf", place / "toy")
    return place


@pytest.fixture
def little_memory() -> Iterator[None]:
    """An allocation on a file's word fails here instead of taking the machine's memory."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (512 << 20), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.usefixtures("little_memory")
def test_fuzz_gguf_files(toy: Path, tmp_path: Path) -> None:
    whole = (toy / "toy.gguf").read_bytes()
    start = min(tensor.offset for tensor in GgufFile(toy / "toy.gguf").tensors.values())
    file, target = tmp_path / "bad.gguf", tmp_path / "out"

    @fuzzing(60)
    @given(body=damaged(whole, hot=start))
    def check(body: bytes) -> None:
        file.write_bytes(body)
        try:
            import_gguf(file, target)
        except ModelError:
            assert not target.exists()
        else:
            shutil.rmtree(target)

    check()


@pytest.mark.usefixtures("little_memory")
def test_fuzz_the_metadata_of_gguf_files(toy: Path, tmp_path: Path) -> None:
    """Files that are whole, and whose keys say strange things."""
    metadata = GgufFile(toy / "toy.gguf").metadata
    file, target = tmp_path / "bad.gguf", tmp_path / "out"
    tensors = random_tensors(len(metadata["tokenizer.ggml.tokens"]))
    plain = {key: value for key, value in metadata.items() if not isinstance(value, list)}

    @fuzzing(40)
    @given(changed=twisted(plain))
    def check(changed: Any) -> None:
        keys = metadata | changed if isinstance(changed, dict) else metadata
        usable = {key: value for key, value in keys.items() if _is_writable(value)}
        write_gguf(file, "llama", tensors, usable)
        try:
            import_gguf(file, target)
        except ModelError:
            assert not target.exists()
        else:
            shutil.rmtree(target)

    check()


def _is_writable(value: Any) -> bool:
    if isinstance(value, float):
        return abs(value) < 1e38  # float32 is what the writer has
    if isinstance(value, bool | str):
        return True
    if isinstance(value, int):
        return 0 <= value < 1 << 32
    return (
        isinstance(value, list)
        and len({type(item) for item in value}) == 1
        and type(value[0]) in (int, str, float)
        and all(isinstance(item, str) or abs(item) < 1 << 31 for item in value)  # lists are of int32
    )


def _text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def _tensor(name: str, count: int, offset: int) -> bytes:
    return _text(name) + struct.pack("<IQIQ", 1, count, 0, offset)


def test_tensors_that_lie_on_each_other_are_refused(tmp_path: Path) -> None:
    """A small file would otherwise fill a disk: each of its tensors is written out."""
    head = struct.pack("<IIQQ", gguf.GGUF_MAGIC, 3, 2, 0)
    (tmp_path / "bad.gguf").write_bytes(head + _tensor("a", 16, 0) + _tensor("b", 16, 32) + bytes(256))
    with pytest.raises(ModelError, match="lies on another"):
        GgufFile(tmp_path / "bad.gguf")


def test_a_header_of_metadata_alone_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dormouse.models.gguf_file.MAX_HEADER_NBYTES", 1000)
    head = struct.pack("<IIQQ", gguf.GGUF_MAGIC, 3, 0, 1) + _text("a") + struct.pack("<IIQ", ARRAY, 0, 4000)
    (tmp_path / "bad.gguf").write_bytes(head + bytes(4000))
    with pytest.raises(ModelError, match="more than 1000 bytes"):
        GgufFile(tmp_path / "bad.gguf")


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("arch", ["gemma3", "smollm3"])
def test_layers_are_counted_before_they_are_believed(tmp_path: Path, arch: str) -> None:
    metadata = shape_metadata(arch, block_count=4_000_000_000) | {f"{arch}.attention.sliding_window": 64}
    write_gguf(tmp_path / "bad.gguf", arch, random_tensors(8), metadata | sentencepiece_metadata())
    with pytest.raises(ModelError, match="4000000000 layers"):
        import_gguf(tmp_path / "bad.gguf", tmp_path / "out")


def test_a_token_without_end_is_refused(tmp_path: Path) -> None:
    """Finding its merges takes the square of its length."""
    vocabulary = sentencepiece_metadata()
    vocabulary["tokenizer.ggml.tokens"][-1] = "a" * 5_000_000
    tensors = random_tensors(len(vocabulary["tokenizer.ggml.tokens"]))
    write_gguf(tmp_path / "bad.gguf", "llama", tensors, shape_metadata("llama") | vocabulary)
    with pytest.raises(ModelError, match="5000000 characters"):
        import_gguf(tmp_path / "bad.gguf", tmp_path / "out")


CONFIGS: tuple[dict[str, Any], ...] = tuple(
    {
        "model_type": family,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 320,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": {"rope_type": rope, "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        | ({"original_max_position_embeddings": 256} if rope != "linear" else {}),
        "layer_types": ["full_attention", "full_attention"],
        "sliding_window": 128,
        "sliding_window_pattern": 6,
        "no_rope_layers": [1, 1],
        "text_config": {"hidden_size": 64},
    }
    for family, rope in (
        ("llama", "llama3"),
        ("qwen3", "yarn"),
        ("gemma3_text", "linear"),
        ("smollm3", "linear"),
    )
)


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config["model_type"])
def test_fuzz_config_json(config: dict[str, Any]) -> None:
    @fuzzing(80)
    @given(raw=twisted(config))
    def check(raw: Any) -> None:
        if not isinstance(raw, dict):
            return  # `read_json` refuses it
        try:
            DecoderConfig.from_hf(raw).canonical()
        except ModelError:
            return

    check()


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json", "config.json"])
def test_fuzz_the_settings_of_a_folder(toy: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "toy"
    shutil.copytree(toy / "toy", folder)
    document = json.loads((folder / name).read_text())

    @fuzzing(40)
    @given(changed=twisted(document))
    def check(changed: Any) -> None:
        (folder / name).write_text(json.dumps(changed))
        try:
            chat = ChatModel.load(open_folder(folder))
            check_folder(folder)
        except ModelError:
            return
        assert all(token_id >= 0 for token_id in chat.eos_token_ids)

    check()


def test_fuzz_tokenizer_json(toy: Path, tmp_path: Path) -> None:
    folder = tmp_path / "toy"
    shutil.copytree(toy / "toy", folder)
    path = folder / "tokenizer.json"
    document = json.loads(path.read_text())
    document["model"]["merges"] = document["model"]["merges"][:3]

    @fuzzing(60)
    @given(changed=twisted(document))
    def check(changed: Any) -> None:
        path.write_text(json.dumps(changed))
        try:
            ChatModel.load(open_folder(folder))
        except ModelError:
            return

    check()


def test_fuzz_safetensors_headers(toy: Path, tmp_path: Path) -> None:
    folder = tmp_path / "toy"
    shutil.copytree(toy / "toy", folder)
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    length = int.from_bytes(whole[:8], "little")

    @fuzzing(100)
    @given(body=damaged(whole[: 8 + length]))
    def check(body: bytes) -> None:
        weights.write_bytes(body + whole[8 + length :])
        try:
            Checkpoint([weights]).shapes  # noqa: B018
            check_folder(folder)
        except ModelError:
            return

    check()


@pytest.mark.parametrize("weights", [b"", b"\x00" * 8, b"\xff" * 64, (1 << 62).to_bytes(8, "little") + b"{}"])
def test_files_that_are_no_safetensors(tmp_path: Path, weights: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(weights)
    with pytest.raises(ModelError):
        Checkpoint([tmp_path / "model.safetensors"])


TEMPLATES: tuple[Any, ...] = (
    7,
    [7],
    [{"name": "default"}],
    [[]],
    {"default": 7},
    {"default": "{% for %}"},
    True,
)


@pytest.mark.parametrize("template", TEMPLATES, ids=str)
def test_templates_that_are_none(toy: Path, tmp_path: Path, template: Any) -> None:
    folder = tmp_path / "toy"
    shutil.copytree(toy / "toy", folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
    try:
        ChatModel.load(open_folder(folder))
    except ModelError as refusal:
        told = str(refusal)
    else:
        told = "a template that rejects every conversation"
    assert "template" in told


def test_a_template_file_that_is_no_text(toy: Path, tmp_path: Path) -> None:
    folder = tmp_path / "toy"
    shutil.copytree(toy / "toy", folder)
    (folder / "chat_template.jinja").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ModelError, match="cannot be read"):
        ChatModel.load(open_folder(folder))
