"""A GGUF file, opened with suspicion: metadata and tensors, nothing allocated on the file's word alone.

The `gguf` package's own reader believes array lengths (a file of 60 bytes can keep it allocating for hours)
and takes seconds for a large vocabulary, so the header is parsed here. Its type tables and dequantizers
are used as they are.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
from gguf.constants import (
    GGML_QUANT_SIZES,
    GGUF_DEFAULT_ALIGNMENT,
    GGUF_MAGIC,
    GGMLQuantizationType,
    GGUFValueType,
)
from numpy.typing import NDArray

from dormouse.domain.errors import ModelError, UnsupportedModel

VERSIONS = (2, 3)
MAX_DIMENSIONS = 4
MAX_STRING_NBYTES = 1 << 24
MAX_ARRAY_ITEMS = 1 << 22
MAX_TENSORS = 1 << 16
MAX_KEYS = 1 << 16
MAX_HEADER_NBYTES = 1 << 26
"""Metadata takes about ten times its size in memory; the largest vocabularies have 20 MB of it."""
ALIGNMENTS = tuple(1 << bits for bits in range(17))

T = TypeVar("T", str, int, float)

_SCALARS = {
    GGUFValueType.UINT8: "<u1",
    GGUFValueType.INT8: "<i1",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT64: "<f8",
    GGUFValueType.BOOL: "?",
}


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where one tensor lies. `shape` is in row-major order, as numpy and torch count."""

    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class GgufFile:
    """The header of a GGUF file, parsed and checked against the file's size.

    Holds no open file: tensors are mapped one at a time by `rows`.
    """

    def __init__(self, path: Path) -> None:
        """Raises ModelError when the file is not a whole GGUF file, UnsupportedModel for tensor types
        and versions that are not known."""
        self.path = path
        try:
            with path.open("rb") as file:
                self.metadata, self.tensors = _Header(path, file).parse()
        except OSError as error:
            raise ModelError(f"cannot read {path}: {error.strerror}") from error

    def rows(self, tensor: GgufTensor) -> NDArray[np.uint8]:
        """The tensor's bytes, mapped from disk: `[rows, bytes of one row]`.

        A row is the last dimension, except that a vector is a column: its rows are its elements.
        """
        num_rows = tensor.shape[0] if len(tensor.shape) == 1 else math.prod(tensor.shape[:-1])
        shape = (num_rows, tensor.nbytes // num_rows)
        try:
            return np.memmap(self.path, np.uint8, "r", offset=tensor.offset, shape=shape)
        except (OSError, ValueError) as error:
            raise ModelError(f"cannot read {tensor.name} of {self.path}: {error}") from error

    def text(self, key: str, default: str | None = None) -> str:
        """The string under `key`. Raises ModelError when it is absent without default, or no string."""
        value = self._value(key, default)
        if not isinstance(value, str):
            raise self._wrong_type(key, value, "a string")
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        """The integer under `key`. Raises ModelError when it is absent without default, or not one."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._wrong_type(key, value, "an integer")
        return value

    def real(self, key: str, default: float | None = None) -> float:
        """The number under `key`. Raises ModelError when it is absent without default, or not finite."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self._wrong_type(key, value, "a finite number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """The boolean under `key`. Raises ModelError when it is something else."""
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self._wrong_type(key, value, "a boolean")
        return value

    def items(self, key: str, type: type[T]) -> list[T]:
        """The array under `key`. Raises ModelError when it is absent or has items of another type."""
        value = self._value(key, None)
        if not isinstance(value, list) or not all(isinstance(item, type) for item in value):
            raise self._wrong_type(key, value, f"an array of {type.__name__}")
        return value

    def _value(self, key: str, default: Any) -> Any:
        value = self.metadata.get(key, default)
        if value is None:
            raise ModelError(f"{self.path} lacks the key {key}; convert or download it again")
        return value

    def _wrong_type(self, key: str, value: object, wanted: str) -> ModelError:
        return ModelError(f"{self.path}: {key} is {str(value)[:60]!r}, not {wanted}; the file is damaged")


class _Header:
    """Reads the header front to back; every length is held against what is left of the file."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path = path
        self._file = file
        self._size = os.fstat(file.fileno()).st_size
        self._position = 0

    def parse(self) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
        """Metadata by key and tensors by name."""
        self._check_magic()
        num_tensors = self._count("tensors", MAX_TENSORS)
        num_keys = self._count("keys", MAX_KEYS)
        metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = self._string()
            if key in metadata:
                raise self._damaged(f"key {key} appears twice")
            metadata[key] = self._typed_value()
        infos = [self._tensor_info() for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
        if alignment not in ALIGNMENTS:
            raise self._damaged(f"alignment {alignment!r} is no power of two")
        start = -(-self._position // alignment) * alignment
        return metadata, self._place(infos, start)

    def _check_magic(self) -> None:
        magic, version = self._unpack("<II")
        if magic != GGUF_MAGIC:
            raise ModelError(f"{self._path} is not a GGUF file (it does not start with GGUF)")
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            order = " (big-endian)" if swapped in VERSIONS else ""
            raise UnsupportedModel(
                f"{self._path} has GGUF version {version}{order}; "
                "little-endian version 2 or 3 can be imported"
            )

    def _place(self, infos: Sequence[GgufTensor], start: int) -> dict[str, GgufTensor]:
        # What lies on each other would make more of a file than there is in it, and fill the disk.
        end = 0
        for info in sorted(infos, key=lambda info: info.offset):
            if info.offset < end:
                raise self._damaged(f"tensor {info.name} lies on another")
            end = info.offset + info.nbytes
        placed: dict[str, GgufTensor] = {}
        for info in infos:
            if info.name in placed:
                raise self._damaged(f"tensor {info.name} appears twice")
            offset = start + info.offset
            if offset + info.nbytes > self._size:
                raise self._damaged(f"tensor {info.name} ends at {offset + info.nbytes}")
            placed[info.name] = GgufTensor(info.name, info.type, info.shape, offset, info.nbytes)
        return placed

    def _tensor_info(self) -> GgufTensor:
        name = self._string()
        num_dimensions = self._count(f"dimensions of {name}", MAX_DIMENSIONS, "<I")
        dimensions = self._unpack(f"<{num_dimensions}Q")
        code, offset = self._unpack("<IQ")
        if not dimensions or 0 in dimensions:
            raise self._damaged(f"tensor {name} is empty")
        try:
            tensor_type = GGMLQuantizationType(code)
        except ValueError as error:
            raise UnsupportedModel(f"tensor {name} of {self._path} has the unknown type {code}") from error
        group, group_nbytes = GGML_QUANT_SIZES[tensor_type]
        if dimensions[0] % group:
            raise self._damaged(f"rows of {name} have {dimensions[0]} values, no multiple of {group}")
        if num_dimensions == 1 and group > 1:
            raise UnsupportedModel(f"vector {name} of {self._path} is quantized as {tensor_type.name}")
        nbytes = math.prod(dimensions) // group * group_nbytes
        return GgufTensor(name, tensor_type, tuple(reversed(dimensions)), offset, nbytes)

    def _typed_value(self) -> Any:
        kind = self._value_type()
        if kind is GGUFValueType.STRING:
            return self._string()
        if kind is GGUFValueType.ARRAY:
            return self._array()
        return self._scalars(kind, 1)[0]

    def _array(self) -> list[Any]:
        kind = self._value_type()
        length = self._count("array items", MAX_ARRAY_ITEMS)
        if kind is GGUFValueType.STRING:
            return [self._string() for _ in range(length)]
        if kind is GGUFValueType.ARRAY:
            raise self._damaged("arrays of arrays")
        return self._scalars(kind, length)

    def _value_type(self) -> GGUFValueType:
        (code,) = self._unpack("<I")
        try:
            return GGUFValueType(code)
        except ValueError as error:
            raise self._damaged(f"value type {code}") from error

    def _scalars(self, kind: GGUFValueType, length: int) -> list[Any]:
        dtype = np.dtype(_SCALARS[kind])
        data = self._take(dtype.itemsize * length)
        if kind is GGUFValueType.BOOL:
            return [byte != 0 for byte in data]
        values: list[Any] = np.frombuffer(data, dtype).tolist()
        return values

    def _string(self) -> str:
        data = self._take(self._count("string bytes", MAX_STRING_NBYTES))
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise self._damaged("a string is not UTF-8") from error

    def _count(self, what: str, limit: int, format: str = "<Q") -> int:
        (count,) = self._unpack(format)
        if count > limit:
            raise self._damaged(f"{count} {what}, more than {limit}")
        return int(count)

    def _unpack(self, format: str) -> tuple[int, ...]:
        return struct.unpack(format, self._take(struct.calcsize(format)))

    def _take(self, nbytes: int) -> bytes:
        if nbytes > self._size - self._position:
            raise self._damaged("the file ends inside its header")
        if self._position + nbytes > MAX_HEADER_NBYTES:
            raise self._damaged(f"its header has more than {MAX_HEADER_NBYTES} bytes")
        data = self._file.read(nbytes)
        if len(data) < nbytes:
            raise self._damaged("the file became shorter while it was read")
        self._position += nbytes
        return data

    def _damaged(self, what: str) -> ModelError:
        return ModelError(
            f"{self._path} is not a whole GGUF file: {what}, at byte {self._position} of {self._size}; "
            "download it again"
        )
