"""The pages of the MLX runtime: plain memory, which reader threads fill without knowing of MLX."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from dormouse.domain.cache_spec import CacheSpec, Half, Section
from dormouse.domain.errors import ModelError

Array = NDArray[np.generic]
Parts = tuple[Array, ...]
"""What a half of the cache consists of: data alone, or data, scales and biases. bf16 is held as uint16."""

_DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(np.uint16), "U32": np.dtype(np.uint32)}


class Pages:
    """`num_pages` pages of the one format. The content of a page that was never written is undefined.

    `generations` counts, per page, how often its content was replaced or written to: who has read a page
    finds out by it whether what was read still stands.
    """

    def __init__(self, cache: CacheSpec, num_pages: int) -> None:
        """Reserve the memory; the system maps it as it is used. Raises ModelError when it cannot."""
        self.cache = cache
        self._memory = _reserve(num_pages, cache.block_nbytes)
        self._halves = _views(self._memory, cache)
        self.generations = np.zeros(num_pages, np.int64)

    @property
    def num_pages(self) -> int:
        """Pages are numbered from 0."""
        return len(self._memory)

    @property
    def nbytes(self) -> int:
        """Bytes reserved."""
        return self._memory.nbytes

    def buffer(self, page: int) -> memoryview:
        """The page itself, writable."""
        return memoryview(self._memory[self._checked(page)])

    def touched(self, page: int) -> None:
        """The content of `page` is another one."""
        self.generations[self._checked(page)] += 1

    def read(self, page: int, num_tokens: int) -> bytes:
        """The page's bytes with the rows from `num_tokens` on, and all padding, as zeros."""
        copy = np.zeros((1, self.cache.block_nbytes), np.uint8)
        self._copy_rows(self._checked(page), _views(copy, self.cache), 0, num_tokens)
        return copy.tobytes()

    def copy(self, source: int, target: int, num_tokens: int) -> None:
        """Copy the first `num_tokens` rows of `source` to `target`."""
        self._copy_rows(self._checked(source), self._halves, self._checked(target), num_tokens)
        self.touched(target)

    def write_rows(self, table: Sequence[int], start: int, halves: tuple[Parts, Parts]) -> None:
        """Write rows from position `start` on. Each part of K and V is `[layers, kv_heads, rows, ...]`."""
        for page, rows, taken in self._spans(table, start, halves[0][0].shape[2]):
            for own, new in zip(self._halves, halves, strict=True):
                for to, of in zip(own, new, strict=True):
                    to[page, :, :, rows] = of[:, :, taken]
            self.touched(page)

    def read_rows(self, table: Sequence[int], count: int, layer: int) -> tuple[Parts, Parts]:
        """Parts of K and V of positions 0 to `count` of one layer, each `[1, kv_heads, count, ...]`."""
        pages = list(table)
        k, v = (tuple(_joined(part[pages, layer], count) for part in half) for half in self._halves)
        return k, v

    def _spans(self, table: Sequence[int], start: int, count: int) -> Iterator[tuple[int, slice, slice]]:
        """Page by page: the page, its rows, and which of the `count` new rows go there."""
        size, done = self.cache.block_size, 0
        while done < count:
            index, row = divmod(start + done, size)
            length = min(size - row, count - done)
            yield table[index], slice(row, row + length), slice(done, done + length)
            done += length

    def _copy_rows(self, source: int, halves: tuple[Parts, Parts], target: int, num_tokens: int) -> None:
        assert 0 <= num_tokens <= self.cache.block_size, (num_tokens, self.cache.block_size)
        for own, other in zip(self._halves, halves, strict=True):
            for of, to in zip(own, other, strict=True):
                to[target, :, :, :num_tokens] = of[source, :, :, :num_tokens]

    def _checked(self, page: int) -> int:
        # A negative index would silently be another page.
        assert 0 <= page < self.num_pages, (page, self.num_pages)
        return page


def _joined(pages: Array, count: int) -> Array:
    """`[pages, kv_heads, block_size, ...]` as `[1, kv_heads, count, ...]`."""
    num_pages, heads, size, columns = pages.shape
    rows: Array = pages.transpose(1, 0, 2, 3).reshape(1, heads, num_pages * size, columns)
    return rows[:, :, :count]


def _views(memory: NDArray[np.uint8], cache: CacheSpec) -> tuple[Parts, Parts]:
    """Each part of K and V in all pages and layers, `[pages, layers, kv_heads, block_size, columns]`."""
    k, v = (
        tuple(_view(memory, cache, sections) for sections in zip(*map(_sections, halves), strict=True))
        for halves in zip(*cache.layers, strict=True)
    )
    return k, v


def _sections(half: Half) -> list[Section]:
    return [part for part in (half.data, half.scales, half.biases) if part is not None]


def _view(memory: NDArray[np.uint8], cache: CacheSpec, sections: tuple[Section, ...]) -> Array:
    first, dtype = sections[0], _DTYPES[sections[0].dtype]
    stride = cache.block_nbytes // cache.num_layers
    for layer, section in enumerate(sections):
        assert section.shape == first.shape, section
        assert section.offset == first.offset + layer * stride, section
    _, size, columns = first.shape
    return np.ndarray(
        (len(memory), len(sections), *first.shape),
        dtype,
        memory.data,
        first.offset,
        (
            cache.block_nbytes,
            stride,
            size * columns * dtype.itemsize,
            columns * dtype.itemsize,
            dtype.itemsize,
        ),
    )


def _reserve(num_pages: int, page_nbytes: int) -> NDArray[np.uint8]:
    nbytes = num_pages * page_nbytes
    try:
        memory = mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError, ValueError) as exc:
        raise ModelError(
            f"no memory for a KV arena of {num_pages} pages ({nbytes / 2**30:.1f} GiB); "
            "start with fewer arena tokens"
        ) from exc
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)  # a fault for each 4 KiB costs more than reading a block
    return np.frombuffer(memory, np.uint8).reshape(num_pages, page_nbytes)
