"""A runtime without a model: deterministic, instant, and honest about its cache.

For tests, demos and benchmarks of everything but the model. Its "KV" of a token is a 64-bit mix of the
token and its position, kept in real pages of the one format; its logits are a pseudo-random row seeded by
all the rows of the sequence as they stand in the pages. So a lost, stale, swapped or foreign page changes
the reply, as it would with a real model, and the same past always gives the same reply.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from dormouse.domain.cache_spec import CacheSpec, KVFormat
from dormouse.domain.model_spec import ModelSpec
from dormouse.domain.plan import Plan
from dormouse.runtimes.base import Logits

NUM_BYTE_TOKENS = 256
EOS = 256
VOCAB_SIZE = 257

_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class FakeRuntime:
    """Token ids are bytes, and `EOS`, which it never prefers. Implements `Runtime`."""

    def __init__(self, num_pages: int, *, block_size: int = 16, context_length: int = 4096) -> None:
        self._spec = ModelSpec(
            name="fake",
            architecture="fake",
            fingerprint="fake-1",
            num_layers=1,
            num_kv_heads=1,
            k_head_dim=4,  # four bf16 values: room for one 64-bit row
            v_head_dim=4,
            vocab_size=VOCAB_SIZE,
            context_length=context_length,
        )
        self._cache = self._spec.cache_spec(KVFormat.BF16, block_size)
        self._arena = np.zeros((num_pages, self._cache.block_nbytes), np.uint8)

    @property
    def name(self) -> str:
        """`fake`."""
        return "fake"

    @property
    def spec(self) -> ModelSpec:
        """A model of bytes."""
        return self._spec

    @property
    def cache(self) -> CacheSpec:
        """bf16 pages of one layer, one head, four values."""
        return self._cache

    @property
    def num_pages(self) -> int:
        """Size of the arena."""
        return len(self._arena)

    @property
    def weights_nbytes(self) -> int:
        """None are held."""
        return 0

    @property
    def working_nbytes(self) -> int:
        """Pages are computed on as they are."""
        return 0

    @property
    def row_invariant(self) -> bool:
        """Rows are mixed one by one."""
        return True

    def forward(self, plan: Plan) -> Logits:
        """Write the rows of every chunk, then read whole sequences back for their logits."""
        for chunk in plan.chunks:
            for offset, token in enumerate(chunk.tokens):
                page, row = divmod(chunk.start + offset, self._cache.block_size)
                self._rows(chunk.pages[page])[row] = _mix(np.uint64(token), chunk.start + offset)
        wanted = [
            self._logits(chunk.pages, end)
            for chunk in plan.chunks
            for end in range(chunk.end - chunk.num_logits + 1, chunk.end + 1)
        ]
        return np.stack(wanted) if wanted else np.empty((0, VOCAB_SIZE), np.float32)

    def page_buffer(self, page: int) -> memoryview:
        """The page itself."""
        return memoryview(self._arena[page])

    def page_loaded(self, page: int) -> None:
        """Nothing to do: the buffer is the page."""

    def read_page(self, page: int, num_tokens: int) -> bytes:
        """The page with its rows from `num_tokens` on as zeros."""
        copy = np.zeros(self._cache.block_nbytes, np.uint8)
        for section in self._cache.sections:
            row_nbytes = section.nbytes // self._cache.block_size
            end = section.offset + num_tokens * row_nbytes
            copy[section.offset : end] = self._arena[page, section.offset : end]
        return copy.tobytes()

    def copy_page(self, source: int, target: int, num_tokens: int) -> None:
        """Copy the first rows."""
        self._rows(target)[:num_tokens] = self._rows(source)[:num_tokens]

    def close(self) -> None:
        """Nothing is held."""

    def _rows(self, page: int) -> NDArray[np.uint64]:
        """The K rows of a page as 64-bit words, `[block_size]`."""
        data = self._cache.layers[0][0].data
        return self._arena[page, data.offset : data.offset + data.nbytes].view(np.uint64)

    def _logits(self, pages: tuple[int, ...], num_tokens: int) -> NDArray[np.float32]:
        """What follows the first `num_tokens` tokens of a sequence."""
        past = np.concatenate([self._rows(page) for page in pages])[:num_tokens]
        order = np.arange(1, num_tokens + 1, dtype=np.uint64) * _GOLDEN | np.uint64(1)
        seed = int((past * order).sum(dtype=np.uint64))
        row = np.random.Generator(np.random.Philox(key=seed)).standard_normal(VOCAB_SIZE, np.float32)
        row[EOS] = row.min() - 1
        return row


class ByteDecoder:
    """Decodes the fake's tokens: each byte is the Latin-1 character of its number."""

    def push(self, token_id: int) -> str:
        """One character, or nothing for `EOS`."""
        return chr(token_id) if token_id < NUM_BYTE_TOKENS else ""

    def flush(self) -> str:
        """Nothing is ever held back."""
        return ""


def encode(text: str) -> tuple[int, ...]:
    """Tokens of Latin-1 `text`."""
    return tuple(text.encode("latin-1"))


def decode(tokens: Iterable[int]) -> str:
    """Text of `tokens`."""
    return "".join(map(ByteDecoder().push, tokens))


def _mix(token: np.uint64, position: int) -> np.uint64:
    """A finalizer of splitmix64 (Steele et al., OOPSLA 2014) over token and position."""
    with np.errstate(over="ignore"):
        word = (token + np.uint64(1)) * _GOLDEN + np.uint64(position) * _MIX_1
        word = (word ^ (word >> np.uint64(30))) * _MIX_1
        word = (word ^ (word >> np.uint64(27))) * _MIX_2
        return np.uint64(word ^ (word >> np.uint64(31)))
