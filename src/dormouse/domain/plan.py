"""What one step computes: the only goods that cross from the engine to a runtime."""

from __future__ import annotations

from dataclasses import dataclass

from dormouse.domain.model_spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Chunk:
    """A run of consecutive tokens of one sequence, to be computed in this step.

    `tokens` stand at positions `start, start + 1, ...`. `pages` is the block table of the sequence from
    position 0 to the last token of this chunk: the token at position p lives in row `p % block_size` of
    `pages[p // block_size]`. Rows before `start` hold the KV of the past, rows of this chunk are
    written by the step. Logits are returned for the last `num_logits` tokens of the chunk.
    """

    tokens: tuple[int, ...]
    start: int
    pages: tuple[int, ...]
    num_logits: int

    @property
    def end(self) -> int:
        """Position after the chunk's last token: how many tokens its last row attends to."""
        return self.start + len(self.tokens)


@dataclass(frozen=True, slots=True)
class Plan:
    """One step: chunks of different sequences, decoding ones (one token) and prefilling ones alike."""

    chunks: tuple[Chunk, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens computed by this step."""
        return sum(len(chunk.tokens) for chunk in self.chunks)

    def check(self, spec: ModelSpec, num_pages: int, block_size: int) -> None:
        """Hold the engine to its side: an index out of range would read or write another sequence's memory.

        Raises AssertionError.
        """
        for chunk in self.chunks:
            assert chunk.tokens, chunk
            assert 0 <= min(chunk.tokens) <= max(chunk.tokens) < spec.vocab_size, chunk.tokens
            assert 0 <= min(chunk.pages) <= max(chunk.pages) < num_pages, chunk.pages
            last = min(spec.context_length, len(chunk.pages) * block_size)
            assert 0 <= chunk.start < chunk.end <= last, (chunk.start, chunk.end, last)


WARM_UP = Plan((Chunk(tokens=(0,), start=0, pages=(0,), num_logits=1),))
"""A decode step. What it writes into the first page is as undefined as what was there."""
