"""Folders that several tests of this part read."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.models.toy_gguf import (
    random_tensors,
    sentencepiece_metadata,
    shape_metadata,
    toy_llama,
    write_gguf,
)

from dormouse.models.chat import ChatModel
from dormouse.models.folder import ModelFolder
from dormouse.models.gguf_import import import_gguf


@pytest.fixture(scope="session")
def byte_level_folder(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    """An imported toy Llama with a byte-level tokenizer and a chat template."""
    folder = tmp_path_factory.mktemp("byte-level")
    toy_llama(folder / "toy.gguf")
    return import_gguf(folder / "toy.gguf", folder / "toy")


@pytest.fixture(scope="session")
def sentencepiece_folder(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    """An imported toy Llama with a sentencepiece tokenizer that puts a space before text, as Llama 2's."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    metadata = shape_metadata("llama") | sentencepiece_metadata() | {"tokenizer.ggml.add_space_prefix": True}
    tensors = random_tensors(len(metadata["tokenizer.ggml.tokens"]))
    gguf = write_gguf(folder / "toy.gguf", "llama", tensors, metadata)
    return import_gguf(gguf, folder / "toy")


@pytest.fixture(scope="session")
def byte_level_chat(byte_level_folder: ModelFolder) -> ChatModel:
    return ChatModel.load(byte_level_folder)


@pytest.fixture(scope="session")
def sentencepiece_chat(sentencepiece_folder: ModelFolder) -> ChatModel:
    return ChatModel.load(sentencepiece_folder)


@pytest.fixture
def models_dir(tmp_path: Path) -> Path:
    return tmp_path / "models"
