"""Import: a GGUF file becomes a plain model folder, once. The runtimes read only such folders."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dormouse.domain.errors import ModelError
from dormouse.models.bf16_weights import shards_of, write_shards
from dormouse.models.folder import CONFIG, TOKENIZER, ModelFolder, open_folder
from dormouse.models.gguf_architectures import architecture_of, model_config, planned_tensors
from dormouse.models.gguf_file import GgufFile
from dormouse.models.gguf_tokenizer import build_tokenizer, special_id, tokenizer_config
from dormouse.models.progress import Progress, no_progress

# llama.cpp ends a turn at these when a file declares no end of turn of its own; most files rely on it.
_END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<|eom_id|>")


def import_gguf(file: Path, target: Path, on_progress: Progress = no_progress) -> ModelFolder:
    """Convert `file` to the model folder `target`: bf16 weights, config, tokenizer, chat template.

    The folder appears whole or not at all. Raises ModelError when `target` exists or the file is
    damaged, UnsupportedModel naming the architecture, tensor or tokenizer that cannot be converted.
    """
    target = target.absolute()
    with _exclusive(target) as partial:
        if target.exists():
            raise ModelError(f"{target} exists; remove it or import under another name")
        partial.mkdir()
        _write_folder(GgufFile(file), partial, on_progress, f"importing {target.name}")
        _sync_folder(partial)
        partial.rename(target)
        _sync_folder(target.parent)
    return open_folder(target)


def _write_folder(file: GgufFile, folder: Path, on_progress: Progress, what: str) -> None:
    # All that can be refused cheaply is refused before the first weight is written.
    architecture = architecture_of(file)
    config = model_config(file, architecture)
    tensors = list(planned_tensors(file, architecture, config))
    tokenizer = build_tokenizer(file)
    if tokenizer.get_vocab_size() > config["vocab_size"]:
        raise ModelError(f"{file.path}: more tokens than the embedding has rows; the file is damaged")
    ids = {f"{role}_token_id": special_id(file, role) for role in ("bos", "eos", "pad")}
    settings = tokenizer_config(file)
    generation = {**ids, "eos_token_id": _end_ids(file, settings) or None}
    generation = {key: value for key, value in generation.items() if value is not None}
    tokenizer.save(str(folder / TOKENIZER))
    _write_json(folder / CONFIG, config | ids)
    _write_json(folder / "tokenizer_config.json", settings)
    _write_json(folder / "generation_config.json", generation)
    write_shards(file, shards_of(tensors), folder, lambda done, total: on_progress(what, done, total))


def _end_ids(file: GgufFile, settings: dict[str, Any]) -> list[int]:
    """Every id that ends a reply: what the file declares, else what its own chat template writes."""
    declared = [special_id(file, role) for role in ("eos", "eot", "eom")]
    ends = {token_id for token_id in declared if token_id is not None}
    if special_id(file, "eot") is None:
        template = settings.get("chat_template", "")
        tokens = file.items("tokenizer.ggml.tokens", str)
        ends |= {tokens.index(token) for token in _END_OF_TURN if token in template and token in tokens}
    return sorted(ends)


@contextmanager
def _exclusive(target: Path) -> Iterator[Path]:
    """A name for the unfinished folder beside `target`, ours alone; whatever is left there goes."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    with target.with_name(f".{target.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        shutil.rmtree(partial, ignore_errors=True)
        try:
            yield partial
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _sync_folder(folder: Path) -> None:
    paths = [*folder.iterdir(), folder] if folder.name.endswith(".partial") else [folder]
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
