"""What the native kernels must give, in NumPy: bytes by tensor views, attention in float64."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from dormouse.domain.cache_spec import CacheSpec, Half, KVFormat, Section
from dormouse.runtimes.torch.kernels import AttentionBatch

native = pytest.importorskip("dormouse.runtimes.torch.native", reason="the native module is not built")
_native = native._native

ISAS: list[str] = _native.isas()
FORMATS = list(KVFormat)
Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]


def make_spec(
    format: KVFormat = KVFormat.K8V4,
    block_size: int = 32,
    kv_heads: int = 2,
    k_dim: int = 64,
    v_dim: int = 64,
) -> CacheSpec:
    """Two layers, so that offsets matter."""
    return CacheSpec.for_heads(
        format, block_size, num_layers=2, num_kv_heads=kv_heads, k_head_dim=k_dim, v_head_dim=v_dim
    )


def bf16_bits(x: Floats) -> NDArray[np.uint16]:
    """Round to nearest even."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded).astype(np.uint16)


def from_bits(bits: NDArray[np.uint16]) -> Floats:
    """The floats that bf16 bits stand for."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def section(page: Bytes, part: Section) -> NDArray[Any]:
    """View of a section of one page; packed words as bytes."""
    flat = page[part.offset : part.offset + part.nbytes]
    dtype: Any = {"F32": np.float32, "BF16": np.uint16, "U32": np.uint8}[part.dtype]
    view: NDArray[Any] = flat.view(dtype).reshape(*part.shape[:2], -1)
    return view


def write_page_row(page: Bytes, half: Half, group_size: int, row: int, x: Floats) -> None:
    """One token's `[kv_heads, dim]`."""
    if half.scales is None or half.biases is None:
        section(page, half.data)[:, row] = x if half.bits == 32 else bf16_bits(x)
        return
    levels = np.float32(2**half.bits - 1)
    groups = x.reshape(len(x), -1, group_size)
    low, high = groups.min(-1) + np.float32(0), groups.max(-1)
    biases, scales = bf16_bits(low), bf16_bits((high - low) / levels)
    wide = from_bits(scales)
    with np.errstate(divide="ignore"):
        inverse = np.where(wide > 0, np.float32(1) / wide, np.float32(0))
    q = np.clip(np.rint((groups - from_bits(biases)[..., None]) * inverse[..., None]), 0, levels)
    q = q.astype(np.uint8).reshape(x.shape)
    section(page, half.data)[:, row] = q if half.bits == 8 else q[:, 0::2] | q[:, 1::2] << 4
    section(page, half.scales)[:, row] = scales
    section(page, half.biases)[:, row] = biases


def read_page_row(page: Bytes, half: Half, group_size: int, row: int) -> Floats:
    """`[kv_heads, dim]` as stored, in float32."""
    data = section(page, half.data)[:, row]
    if half.scales is None or half.biases is None:
        return data.astype(np.float32) if half.bits == 32 else from_bits(data)
    q = data if half.bits == 8 else np.stack((data & 15, data >> 4), -1).reshape(len(data), -1)
    scales, biases = (from_bits(section(page, part)[:, row]) for part in (half.scales, half.biases))
    groups = q.reshape(len(q), -1, group_size).astype(np.float32)
    return (groups * scales[..., None] + biases[..., None]).reshape(len(q), -1)


@dataclass
class Case:
    """Sequences of given lengths in shuffled pages of an arena, the rest of which is NaN bytes."""

    spec: CacheSpec
    lengths: list[int]
    layer: int = 1
    seed: int = 0
    arena: torch.Tensor = field(init=False)
    tables: list[list[int]] = field(init=False)
    rng: np.random.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)
        size = self.spec.block_size
        counts = [-(-length // size) for length in self.lengths]
        pages = self.rng.permutation(sum(counts) + 1)
        self.tables = [pages[sum(counts[:i]) :][:count].tolist() for i, count in enumerate(counts)]
        self.arena = torch.full((len(pages), self.spec.block_nbytes), 0xFF, dtype=torch.uint8)
        kernels = native.NativeKernels(self.spec)
        for table, length in zip(self.tables, self.lengths, strict=True):
            positions = torch.arange(length)
            slots = torch.tensor(table)[positions // size] * size + positions % size
            k = self.tensor(length, self.spec.num_kv_heads, self.spec.k_head_dim)
            v = self.tensor(length, self.spec.num_kv_heads, self.spec.v_head_dim)
            kernels.write_kv(self.arena, self.layer, k, v, slots)

    def tensor(self, *shape: int) -> torch.Tensor:
        """Standard normal float32."""
        return torch.from_numpy(self.rng.standard_normal(shape, dtype=np.float32))

    def batch(self, chunks: list[tuple[int, int, int]], padding: int = 0) -> AttentionBatch:
        """Chunks of (sequence, start, tokens)."""
        width = max(len(self.tables[s]) for s, _, _ in chunks) + padding
        tables = [self.tables[s] + [0] * (width - len(self.tables[s])) for s, _, _ in chunks]
        offsets = np.cumsum([0] + [tokens for _, _, tokens in chunks])
        return AttentionBatch(
            torch.tensor(offsets, dtype=torch.int32),
            torch.tensor([start for _, start, _ in chunks], dtype=torch.int32),
            torch.tensor(tables, dtype=torch.int32),
        )

    def attend(
        self, q: torch.Tensor, chunks: list[tuple[int, int, int]], window: int | None = None, padding: int = 0
    ) -> torch.Tensor:
        """The kernel's answer."""
        out: torch.Tensor = native.NativeKernels(self.spec).attend(
            self.arena, self.layer, q, self.batch(chunks, padding), self.scale, window
        )
        return out

    @property
    def scale(self) -> float:
        """The usual one."""
        return float(self.spec.k_head_dim**-0.5)

    def stored(self, sequence: int, half: int) -> NDArray[np.float64]:
        """`[length, kv_heads, dim]` as any reader must see it."""
        part = self.spec.layers[self.layer][half]
        pages, size = self.arena.numpy(), self.spec.block_size
        rows = [
            read_page_row(pages[self.tables[sequence][p // size]], part, self.spec.group_size, p % size)
            for p in range(self.lengths[sequence])
        ]
        return np.stack(rows).astype(np.float64)

    def expected(
        self, q: torch.Tensor, chunks: list[tuple[int, int, int]], window: int | None = None
    ) -> NDArray[np.float64]:
        """Softmax attention in float64, row by row."""
        rows, taken = [], 0
        queries = q.double().numpy()
        group = q.shape[1] // self.spec.num_kv_heads
        for sequence, start, tokens in chunks:
            keys = np.repeat(self.stored(sequence, 0), group, axis=1)
            values = np.repeat(self.stored(sequence, 1), group, axis=1)
            for position in range(start, start + tokens):
                seen = slice(0 if window is None else max(0, position - window + 1), position + 1)
                scores = np.einsum("hd,khd->hk", queries[taken], keys[seen]) * self.scale
                weights = np.exp(scores - scores.max(-1, keepdims=True))
                weights /= weights.sum(-1, keepdims=True)
                rows.append(np.einsum("hk,khd->hd", weights, values[seen]))
                taken += 1
        return np.stack(rows)
