"""Files that are not what they say: a typed error, quickly, and no allocation on their word."""

from __future__ import annotations

import resource
import struct
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
from tests.models.toy_gguf import toy_llama, write_gguf

from dormouse.domain.errors import ModelError, UnsupportedModel
from dormouse.models.gguf_file import GgufFile
from dormouse.models.gguf_import import import_gguf

MAGIC, UINT32, STRING, ARRAY = gguf.GGUF_MAGIC, 4, 8, 9
HUGE = 2**62


def header(*, version: int = 3, tensors: int = 0, keys: int = 0) -> bytes:
    return struct.pack("<IIQQ", MAGIC, version, tensors, keys)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def tensor(name: str, dimensions: tuple[int, ...], type: int = 0, offset: int = 0) -> bytes:
    count = len(dimensions)
    return text(name) + struct.pack(f"<I{count}QIQ", count, *dimensions, type, offset)


HOSTILE = {
    "empty": b"",
    "no magic": b"PK\x03\x04" + bytes(40),
    "magic alone": b"GGUF",
    "tensor count": header(tensors=HUGE),
    "key count": header(keys=HUGE),
    "more keys than there are": header(keys=3) + text("a") + struct.pack("<II", UINT32, 1),
    "key length": header(keys=1) + struct.pack("<Q", HUGE),
    "string length": header(keys=1) + text("a") + struct.pack("<IQ", STRING, HUGE),
    "string past the end": header(keys=1) + text("a") + struct.pack("<IQ", STRING, 1 << 20),
    "array length": header(keys=1) + text("a") + struct.pack("<IIQ", ARRAY, UINT32, HUGE),
    "array past the end": header(keys=1) + text("a") + struct.pack("<IIQ", ARRAY, UINT32, 1 << 22),
    "array of strings": header(keys=1) + text("a") + struct.pack("<IIQ", ARRAY, STRING, 1 << 22),
    "array of arrays": header(keys=1) + text("a") + struct.pack("<IIQ", ARRAY, ARRAY, 1 << 20) * 50,
    "value type": header(keys=1) + text("a") + struct.pack("<II", 99, 0),
    "not UTF-8": header(keys=1) + struct.pack("<Q", 2) + b"\xff\xfe" + struct.pack("<II", UINT32, 1),
    "key twice": header(keys=2) + (text("a") + struct.pack("<II", UINT32, 1)) * 2,
    "alignment 0": header(keys=1) + text("general.alignment") + struct.pack("<II", UINT32, 0),
    "alignment 3": header(keys=1) + text("general.alignment") + struct.pack("<II", UINT32, 3),
    "alignment is text": header(keys=1) + text("general.alignment") + struct.pack("<I", STRING) + text("x"),
    "dimensions": header(tensors=1) + text("t") + struct.pack("<I", 2**31),
    "no dimensions": header(tensors=1) + tensor("t", ()),
    "empty tensor": header(tensors=1) + tensor("t", (0, 4)) + bytes(64),
    "huge tensor": header(tensors=1) + tensor("t", (HUGE, HUGE, HUGE, HUGE)) + bytes(64),
    "tensor offset": header(tensors=1) + tensor("t", (4,), offset=2**63) + bytes(64),
    "tensor twice": header(tensors=2) + tensor("t", (4,)) * 2 + bytes(64),
    "broken rows": header(tensors=1) + tensor("t", (33, 2), type=8) + bytes(256),
}

REFUSED = {
    "version 1": header(version=1),
    "version 4": header(version=4),
    "big-endian": struct.pack(">IIQQ", MAGIC, 3, 0, 0)[::1].replace(struct.pack(">I", MAGIC), b"GGUF"),
    "tensor type": header(tensors=1) + tensor("t", (4,), type=9999) + bytes(64),
    "quantized vector": header(tensors=1) + tensor("t", (64,), type=8) + bytes(128),
}


@pytest.fixture
def little_memory() -> Iterator[None]:
    """An allocation on a file's word fails here instead of taking the machine's memory."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.timeout(5)
@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_called_damaged(tmp_path: Path, name: str) -> None:
    path = tmp_path / "hostile.gguf"
    path.write_bytes(HOSTILE[name])
    with pytest.raises(ModelError, match=r"hostile\.gguf"):
        GgufFile(path)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_known_is_refused_by_name(tmp_path: Path, name: str) -> None:
    path = tmp_path / "foreign.gguf"
    path.write_bytes(REFUSED[name])
    with pytest.raises(UnsupportedModel, match=r"foreign\.gguf"):
        GgufFile(path)


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    toy_llama(tmp_path / "toy.gguf")
    whole = (tmp_path / "toy.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    # GGUFWriter pads the end of the last tensor, which nobody misses.
    for length in {*range(0, 3000, 31), *range(3000, len(whole) - 64, 9001)}:
        cut.write_bytes(whole[:length])
        with pytest.raises(ModelError):
            GgufFile(cut)


@pytest.mark.usefixtures("little_memory")
def test_flipped_bytes_never_crash_an_import(tmp_path: Path) -> None:
    toy_llama(tmp_path / "toy.gguf")
    whole = bytearray((tmp_path / "toy.gguf").read_bytes())
    start = min(t.offset for t in GgufFile(tmp_path / "toy.gguf").tensors.values())
    random = np.random.default_rng(7)
    outcomes = {"imported": 0, "refused": 0}
    for attempt in range(100):
        damaged = whole.copy()
        position = int(random.integers(start if attempt % 4 else 2000))
        damaged[position] ^= int(random.integers(1, 256))
        (tmp_path / "bad.gguf").write_bytes(damaged)
        try:
            import_gguf(tmp_path / "bad.gguf", tmp_path / f"out{attempt}")
            outcomes["imported"] += 1
        except ModelError:
            outcomes["refused"] += 1
    # Many bytes are tokens and numbers that stay legal; both outcomes must occur for this to test anything.
    assert min(outcomes.values()) > 10, outcomes


def test_values_are_checked_when_they_are_read(tmp_path: Path) -> None:
    write_gguf(
        tmp_path / "toy.gguf", "llama", {}, {"text": "x", "number": 3, "real": float("inf"), "list": [1, 2]}
    )
    file = GgufFile(tmp_path / "toy.gguf")
    assert file.text("text") == "x"
    assert file.integer("number") == 3
    assert file.real("number") == 3.0
    assert file.items("list", int) == [1, 2]
    assert file.text("absent", "default") == "default"
    with pytest.raises(ModelError, match="lacks the key absent"):
        file.integer("absent")
    with pytest.raises(ModelError, match="not an integer"):
        file.integer("text")
    with pytest.raises(ModelError, match="not a string"):
        file.text("number")
    with pytest.raises(ModelError, match="not a finite number"):
        file.real("real")
    with pytest.raises(ModelError, match="not a boolean"):
        file.flag("number", default=False)
    with pytest.raises(ModelError, match="not an array of str"):
        file.items("list", str)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="No such file"):
        import_gguf(tmp_path / "absent.gguf", tmp_path / "toy")
    with pytest.raises(ModelError, match="Is a directory"):
        import_gguf(tmp_path, tmp_path / "toy")
