"""The arena: the memory of all pages as one tensor, and page bytes in, out and across."""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Iterator

import torch
from torch import Tensor

from dormouse.domain.cache_spec import CacheSpec
from dormouse.domain.errors import ModelError
from dormouse.runtimes.torch.headroom import Headroom


class Arena:
    """`num_pages` pages on one device. The content of a page that was never written is undefined.

    `memory` is `[num_pages, block_nbytes]` uint8, 64-byte aligned.
    """

    def __init__(self, cache: CacheSpec, num_pages: int, device: torch.device) -> None:
        """Reserve the memory; on the CPU it is mapped ahead of its use.

        Raises ModelError when the device has not that much.
        """
        self.cache = cache
        try:
            self.memory = _reserve(num_pages * cache.block_nbytes, device).view(num_pages, -1)
        except (RuntimeError, OSError, OverflowError) as exc:
            size = num_pages * cache.block_nbytes
            raise ModelError(
                f"no memory for a KV arena of {num_pages} pages ({size / 2**30:.1f} GiB) on {device}; "
                "start with fewer arena tokens"
            ) from exc
        self._staging: dict[int, Tensor] = {}
        self._headroom = Headroom(self.memory)
        self._headroom.reach(0)
        self._end = weakref.finalize(self, self._headroom.close)

    @property
    def num_pages(self) -> int:
        """Pages are numbered from 0."""
        return self.memory.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes reserved."""
        return self.memory.nbytes

    def reach(self, page: int) -> None:
        """`page` is about to be used: memory behind it is made ready."""
        self._headroom.reach((page + 1) * self.cache.block_nbytes)

    def close(self) -> None:
        """Stop making memory ready. Idempotent."""
        self._end()

    def page_buffer(self, page: int) -> memoryview:
        """Writable memory of `block_nbytes` bytes; on the CPU the page itself, else a staging buffer."""
        self.reach(page)
        target = self._page(page)
        if target.device.type != "cpu":
            target = torch.empty(self.cache.block_nbytes, dtype=torch.uint8)
            self._staging[page] = target
        return target.numpy().data

    def page_loaded(self, page: int) -> None:
        """Upload what was written to `page_buffer(page)`."""
        staged = self._staging.pop(page, None)
        if staged is not None:
            self._page(page).copy_(staged)

    def read_page(self, page: int, num_tokens: int) -> bytes:
        """The page's bytes with the rows from `num_tokens` on, and all padding, as zeros."""
        source = self._page(page)
        copy = torch.zeros_like(source)
        self._copy_rows(source, copy, num_tokens)
        return copy.cpu().numpy().tobytes()

    def copy_page(self, source: int, target: int, num_tokens: int) -> None:
        """Copy the first `num_tokens` rows of `source` to `target`."""
        self._copy_rows(self._page(source), self._page(target), num_tokens)

    def _page(self, page: int) -> Tensor:
        # A negative index would silently be another page.
        assert 0 <= page < self.num_pages, (page, self.num_pages)
        return self.memory[page]

    def _copy_rows(self, source: Tensor, target: Tensor, num_tokens: int) -> None:
        assert 0 <= num_tokens <= self.cache.block_size, (num_tokens, self.cache.block_size)
        for to, of in zip(self._sections(target), self._sections(source), strict=True):
            to[:, :, :num_tokens].copy_(of[:, :, :num_tokens])

    def _sections(self, page: Tensor) -> Iterator[Tensor]:
        """Each section of the page for all layers at once, `[layers, kv_heads, block_size, row bytes]`.

        Layers lie one after the other in equal strides, as every section is padded alike.
        """
        cache = self.cache
        by_layer = page.view(cache.num_layers, -1)
        parts = (part for half in cache.layers[0] for part in (half.data, half.scales, half.biases))
        for part in parts:
            if part is not None:
                flat = by_layer[:, part.offset : part.offset + part.nbytes]
                yield flat.view(cache.num_layers, cache.num_kv_heads, cache.block_size, -1)


def _reserve(nbytes: int, device: torch.device) -> Tensor:
    """Memory whose content is undefined; on the CPU the system maps it as it is touched."""
    if device.type != "cpu" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(nbytes, dtype=torch.uint8, device=device)
    # In huge pages: a fault for each 4 KiB costs more than the read that fills a block (13 against 6 ms
    # for 38 MB), and attention walks the whole of it.
    memory = mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
