"""Canonical prompts: what clients put into them that changes without meaning anything is taken out."""

from __future__ import annotations

import re

_ATTRIBUTION = re.compile(r"\Ax-anthropic-[a-z-]+:[^\n]*(?:\n|\Z)")
"""A pseudo-header that Claude Code writes at the head of a system block. Its hash differs between
conversations, and in older versions between requests, so that no prefix would match
(anthropics/claude-code#68900, ggml-org/llama.cpp#21793)."""


def without_attribution(block: str) -> str:
    """A system text block without the client's attribution line at its start."""
    return _ATTRIBUTION.sub("", block)
