"""The fingerprint of a model: equal for equal weights, config and tokenizer, wherever they lie."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

_CHUNK_NBYTES = 1 << 22
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
"""What decides which ids a text becomes; those that a folder has."""


class DigestCache:
    """Digests of files, kept in one JSON file: hashing 16 GB of weights at every start takes too long.

    An entry holds as long as path, size, modification time (ns) and inode are the same. A cache that cannot
    be read is started anew; one that cannot be written is an OSError.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._entries = _read_entries(path)

    def get(self, key: str) -> str | None:
        """The digest kept under `key`."""
        return self._entries.get(key)

    def put(self, key: str, digest: str) -> None:
        """Keep a digest; atomically replaces the file."""
        self._entries[key] = digest
        self._path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._path.with_name(f"{self._path.name}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps(self._entries, indent=1, sort_keys=True))
        temporary.replace(self._path)


def _read_entries(path: Path) -> dict[str, str]:
    try:
        entries = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    if not isinstance(entries, dict):
        return {}
    return {str(key): str(digest) for key, digest in entries.items()}


def model_fingerprint(
    folder: Path, weight_files: Iterable[Path], config: str, cache: DigestCache | None = None
) -> str:
    """Hex blake2b over weights, canonical config and tokenizer.

    Weight files count in name order by their bytes, not by their names; `config` is
    `DecoderConfig.canonical()`. `cache` spares hashing weight files that did not change since.
    """
    digest = hashlib.blake2b(digest_size=16, person=b"dormouse-model")
    for path in sorted(weight_files):
        digest.update(bytes.fromhex(_file_digest(path, cache)))
    digest.update(hashlib.blake2b(config.encode()).digest())
    for name in TOKENIZER_FILES:
        path = folder / name
        if path.is_file():
            digest.update(name.encode())
            digest.update(bytes.fromhex(_file_digest(path, None)))
    return digest.hexdigest()


def _file_digest(path: Path, cache: DigestCache | None) -> str:
    stat = path.stat()
    key = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns} {stat.st_ino}"
    if cache is not None and (known := cache.get(key)):
        return known
    digest = hashlib.blake2b()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_NBYTES):
            digest.update(chunk)
    if cache is not None:
        cache.put(key, digest.hexdigest())
    return digest.hexdigest()
