"""What executes a model. A runtime holds tensors and no policy; the engine thread alone calls it."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dormouse.domain.cache_spec import CacheSpec
from dormouse.domain.model_spec import ModelSpec
from dormouse.domain.plan import Plan

Logits = NDArray[np.float32]
"""`[rows, vocab_size]`: the rows that each chunk wants, in the order of the plan and of its tokens."""


class Runtime(Protocol):
    """A loaded model with an arena of `num_pages` pages of `cache.block_nbytes` bytes each.

    Row invariance: the KV and logits of a token depend on its past alone, never on the chunk it was
    computed in or on the other chunks of the step. Sleep is invisible because of this, also where a block
    was lost and is computed again. A runtime that says it has none keeps three weaker promises: steps of
    the same chunks over the same bytes give the same bits; that pages left and came back in between, or lie
    elsewhere, changes nothing; and other chunks change logits by what rounding does.
    """

    @property
    def name(self) -> str:
        """`fake`, `torch` or `mlx`, for logs and the user."""

    @property
    def spec(self) -> ModelSpec:
        """The loaded model."""

    @property
    def cache(self) -> CacheSpec:
        """The format of every page."""

    @property
    def num_pages(self) -> int:
        """Pages are numbered from 0."""

    @property
    def weights_nbytes(self) -> int:
        """Bytes of weights held in memory."""

    @property
    def working_nbytes(self) -> int:
        """Bytes held beside weights and pages for sequences that ran last; any thread may ask."""

    @property
    def row_invariant(self) -> bool:
        """Whether row invariance holds to the bit."""

    def forward(self, plan: Plan) -> Logits:
        """Write the KV of the plan's tokens into their pages and return the wanted logits.

        Blocks until the device is done; the result is the caller's to keep and change. Rows that are
        NaN are returned as they are: whose they are is for the caller to judge.
        """

    def page_buffer(self, page: int) -> memoryview:
        """Writable memory of `block_nbytes` bytes to read a block's payload into.

        May be filled by another thread; the page's content is undefined until `page_loaded`.
        """

    def page_loaded(self, page: int) -> None:
        """The buffer of `page` was filled: make it the page's content."""

    def read_page(self, page: int, num_tokens: int) -> bytes:
        """The page's bytes, the rows from `num_tokens` on as zeros (they may be another agent's)."""

    def copy_page(self, source: int, target: int, num_tokens: int) -> None:
        """Copy the first `num_tokens` rows of `source` to `target`; its other rows are undefined."""

    def close(self) -> None:
        """Free the model and the arena. Idempotent."""
