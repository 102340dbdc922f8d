"""safetensors files in bf16, written tensor by tensor: the whole model is never in memory."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from gguf.quants import dequantize
from numpy.typing import NDArray

from dormouse.domain.errors import ModelError, UnsupportedModel
from dormouse.models.folder import WEIGHTS_INDEX
from dormouse.models.gguf_architectures import Planned
from dormouse.models.gguf_file import GgufFile

BF16_NBYTES = 2
SHARD_NBYTES = 5 * 10**9
_CHUNK_VALUES = 1 << 22


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of the folder and the tensors it holds, in order."""

    file_name: str
    tensors: tuple[Planned, ...]


def shards_of(tensors: Sequence[Planned], limit: int = SHARD_NBYTES) -> tuple[Shard, ...]:
    """The tensors cut into files of at most `limit` bytes each (a larger tensor gets its own)."""
    runs: list[list[Planned]] = [[]]
    filled = 0
    for tensor in tensors:
        nbytes = _nbytes(tensor)
        if runs[-1] and filled + nbytes > limit:
            runs.append([])
            filled = 0
        runs[-1].append(tensor)
        filled += nbytes
    if len(runs) == 1:
        return (Shard("model.safetensors", tuple(runs[0])),)
    return tuple(
        Shard(f"model-{number:05}-of-{len(runs):05}.safetensors", tuple(run))
        for number, run in enumerate(runs, start=1)
    )


def write_shards(
    file: GgufFile, shards: Sequence[Shard], folder: Path, on_written: Callable[[int, int], None]
) -> None:
    """Write the shards, and an index when there are several; all of it is on disk on return.

    `on_written` gets bytes done and in all. Raises UnsupportedModel for a tensor type without dequantizer
    and ModelError when a weight is not finite.
    """
    total = sum(_nbytes(tensor) for shard in shards for tensor in shard.tensors)
    done = 0
    for shard in shards:
        with (folder / shard.file_name).open("wb") as output:
            output.write(_header(shard))
            for tensor in shard.tensors:
                for chunk in _chunks(file, tensor):
                    _write(output, to_bf16(chunk))
                    done += chunk.size * BF16_NBYTES
                    on_written(done, total)
            output.flush()
            os.fsync(output.fileno())
    if len(shards) > 1:
        weight_map = {tensor.name: shard.file_name for shard in shards for tensor in shard.tensors}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / WEIGHTS_INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")


def to_bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Finite float32 rounded to the nearest bfloat16 (ties to even), as its bits."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    half = ((bits >> 16) & 1) + np.uint32(0x7FFF)
    return ((bits + half) >> 16).astype("<u2")


def _chunks(file: GgufFile, tensor: Planned) -> Iterator[NDArray[np.float32]]:
    rows = file.rows(tensor.source)
    step = max(1, _CHUNK_VALUES * len(rows) // math.prod(tensor.source.shape))
    for start in range(0, len(rows), step):
        stop = start + step
        if tensor.row_order is None:
            packed = np.ascontiguousarray(rows[start:stop])
        else:
            packed = rows[tensor.row_order[start:stop]]
        values = _dequantized(np.asarray(packed), tensor)
        if not np.isfinite(values).all():
            raise ModelError(
                f"{file.path}: {tensor.source.name} has values that are not finite; download it again"
            )
        yield values + np.float32(tensor.added) if tensor.added else values


def _dequantized(packed: NDArray[np.uint8], tensor: Planned) -> NDArray[np.float32]:
    try:
        # Garbage scales overflow here, and are found by the caller as values that are not finite.
        with np.errstate(over="ignore", invalid="ignore"):
            values: NDArray[np.float32] = dequantize(packed, tensor.source.type)
    except (NotImplementedError, ValueError) as error:
        raise UnsupportedModel(
            f"tensor {tensor.source.name} has type {tensor.source.type.name}, which cannot be dequantized"
        ) from error
    return values


def _header(shard: Shard) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in shard.tensors:
        end = offset + _nbytes(tensor)
        shape = list(tensor.source.shape)
        entries[tensor.name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _nbytes(tensor: Planned) -> int:
    return math.prod(tensor.source.shape) * BF16_NBYTES


def _write(output: BinaryIO, values: NDArray[np.uint16]) -> None:
    output.write(values.data)
