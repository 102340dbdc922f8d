"""The one format: how the KV of a block lies in bytes, in a page and in a file alike.

A page holds `block_size` consecutive tokens of all layers. Per layer it holds K data, K scales, K biases,
then V data, scales, biases, each `[kv_heads, block_size, ...]` and 64-byte aligned. Quantized values are
affine (`x = q * scale + bias`, per token, head and group along the head) and packed little-endian into
uint32 in the order of MLX's `quantize`; scales and biases are bf16.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from math import prod

from dormouse.domain.errors import UnsupportedModel

ALIGNMENT = 64
GROUP_SIZES = (64, 32)
MIN_BLOCK_SIZE = 16
MAX_BLOCK_SIZE = 512
_MAX_DIMENSION = 1 << 14
DTYPE_NBYTES = {"F32": 4, "BF16": 2, "U32": 4, "U8": 1}
"""Names as safetensors spells them."""


class KVFormat(StrEnum):
    """How K and V are stored. `f32` is exact and large: for numerics, not for serving."""

    F32 = "f32"
    BF16 = "bf16"
    Q8 = "q8"
    K8V4 = "k8v4"
    Q4 = "q4"

    @property
    def bits(self) -> tuple[int, int]:
        """Bits of a K value and of a V value."""
        return _BITS[self]


_BITS = {
    KVFormat.F32: (32, 32),
    KVFormat.BF16: (16, 16),
    KVFormat.Q8: (8, 8),
    KVFormat.K8V4: (8, 4),
    KVFormat.Q4: (4, 4),
}


@dataclass(frozen=True, slots=True)
class Section:
    """One named tensor inside a page. `offset` and `nbytes` are in bytes from the page's start."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Half:
    """The K or the V half of one layer: where its parts lie in a page.

    `data` is `[kv_heads, block_size, head_dim]` in F32 or BF16, or packed
    `[kv_heads, block_size, head_dim * bits / 32]` U32; `scales` and `biases` are
    `[kv_heads, block_size, head_dim / group_size]` BF16, absent for unquantized formats.
    """

    bits: int
    head_dim: int
    data: Section
    scales: Section | None
    biases: Section | None


@dataclass(frozen=True)
class CacheSpec:
    """Shape and format of a model's KV cache; everything that fixes the bytes of a page."""

    format: KVFormat
    block_size: int
    num_layers: int
    num_kv_heads: int
    k_head_dim: int
    v_head_dim: int
    group_size: int

    @classmethod
    def for_heads(
        cls,
        format: KVFormat,
        block_size: int,
        *,
        num_layers: int,
        num_kv_heads: int,
        k_head_dim: int,
        v_head_dim: int,
    ) -> CacheSpec:
        """The spec with the largest group size that divides both heads.

        Raises UnsupportedModel when a quantized format is asked for and no group size fits, and
        ValueError when `block_size` is not a power of two from 16 to 512.
        """
        if not MIN_BLOCK_SIZE <= block_size <= MAX_BLOCK_SIZE or block_size & (block_size - 1):
            raise ValueError(
                f"block size {block_size} is not a power of two from {MIN_BLOCK_SIZE} to {MAX_BLOCK_SIZE}"
            )
        fitting = [g for g in GROUP_SIZES if k_head_dim % g == 0 and v_head_dim % g == 0]
        if min(format.bits) < 16 and not fitting:
            raise UnsupportedModel(
                f"KV format {format} needs head sizes that 32 divides; this model has "
                f"{k_head_dim} and {v_head_dim}. Use --kv-format bf16"
            )
        group_size = fitting[0] if fitting else GROUP_SIZES[-1]
        return cls(format, block_size, num_layers, num_kv_heads, k_head_dim, v_head_dim, group_size)

    @cached_property
    def layers(self) -> tuple[tuple[Half, Half], ...]:
        """Per layer, where its K half and its V half lie."""
        return self._layout[0]

    @cached_property
    def block_nbytes(self) -> int:
        """Bytes of one page, and of one block file's payload."""
        return self._layout[1]

    @property
    def token_nbytes(self) -> float:
        """Bytes of KV per token."""
        return self.block_nbytes / self.block_size

    @cached_property
    def sections(self) -> tuple[Section, ...]:
        """Every section in page order, with `padding.{n}` sections where alignment left a hole.

        The padding is named because safetensors allows no holes between tensors.
        """
        placed: list[Section] = []
        end = 0
        halves = (half for pair in self.layers for half in pair)
        parts = (p for h in halves for p in (h.data, h.scales, h.biases) if p is not None)
        for part in parts:
            if part.offset > end:
                placed.append(_padding(len(placed), end, part.offset))
            placed.append(part)
            end = part.offset + part.nbytes
        if self.block_nbytes > end:
            placed.append(_padding(len(placed), end, self.block_nbytes))
        return tuple(placed)

    def fingerprint(self) -> str:
        """Text that differs whenever the bytes of a page would mean something else."""
        return (
            f"kv1 {self.format} block={self.block_size} layers={self.num_layers} "
            f"heads={self.num_kv_heads} k={self.k_head_dim} v={self.v_head_dim} "
            f"group={self.group_size}"
        )

    @classmethod
    def parse(cls, fingerprint: str) -> CacheSpec:
        """The spec with that fingerprint. Raises ValueError when there is none."""
        version, _, rest = fingerprint.partition(" ")
        name, *fields = rest.split(" ")
        numbers = {key: int(value) for key, _, value in (field.partition("=") for field in fields)}
        if not all(0 < number <= _MAX_DIMENSION for number in numbers.values()):
            raise ValueError(f"{fingerprint!r} has numbers that no model has")
        try:
            spec = cls.for_heads(
                KVFormat(name),
                numbers["block"],
                num_layers=numbers["layers"],
                num_kv_heads=numbers["heads"],
                k_head_dim=numbers["k"],
                v_head_dim=numbers["v"],
            )
        except (KeyError, UnsupportedModel) as error:
            raise ValueError(f"{fingerprint!r} describes no KV cache") from error
        if version != "kv1" or spec.fingerprint() != fingerprint:
            raise ValueError(f"{fingerprint!r} describes no KV cache of this version")
        return spec

    @cached_property
    def _layout(self) -> tuple[tuple[tuple[Half, Half], ...], int]:
        k_bits, v_bits = self.format.bits
        offset = 0
        layers = []
        for layer in range(self.num_layers):
            k, offset = self._half(f"layers.{layer}.k", k_bits, self.k_head_dim, offset)
            v, offset = self._half(f"layers.{layer}.v", v_bits, self.v_head_dim, offset)
            layers.append((k, v))
        return tuple(layers), offset

    def _half(self, name: str, bits: int, head_dim: int, offset: int) -> tuple[Half, int]:
        rows = (self.num_kv_heads, self.block_size)
        if bits >= 16:
            dtype = "F32" if bits == 32 else "BF16"
            data, offset = _section(f"{name}.data", dtype, (*rows, head_dim), offset)
            return Half(bits, head_dim, data, None, None), offset
        data, offset = _section(f"{name}.data", "U32", (*rows, head_dim * bits // 32), offset)
        groups = (*rows, head_dim // self.group_size)
        scales, offset = _section(f"{name}.scales", "BF16", groups, offset)
        biases, offset = _section(f"{name}.biases", "BF16", groups, offset)
        return Half(bits, head_dim, data, scales, biases), offset


def _section(name: str, dtype: str, shape: tuple[int, ...], offset: int) -> tuple[Section, int]:
    nbytes = prod(shape) * DTYPE_NBYTES[dtype]
    end = -(-(offset + nbytes) // ALIGNMENT) * ALIGNMENT
    return Section(name, dtype, shape, offset, nbytes), end


def _padding(number: int, start: int, end: int) -> Section:
    return Section(f"padding.{number}", "U8", (end - start,), start, end - start)
