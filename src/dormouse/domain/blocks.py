"""Blocks and their names: a chain of token runs, each keyed by its whole past.

`BlockKey = blake2b(parent key + token ids)`, personalised by the namespace. Two equal keys mean: same
model, same format, same tenant, same tokens from the first to the last. A block of anything else cannot
match by construction, so a lookup needs no further checks.
"""

from __future__ import annotations

import hashlib
import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NewType

BlockKey = NewType("BlockKey", bytes)
"""32 bytes."""

Namespace = NewType("Namespace", bytes)
"""16 bytes: fingerprint of weights, config, tokenizer, KV format, block size and tenant."""

Tokens = Sequence[int]

KEY_NBYTES = 32
NAMESPACE_NBYTES = 16
ROOT = BlockKey(b"")
"""The parent of every first block."""


def pack_tokens(tokens: Iterable[int]) -> bytes:
    """Token ids as little-endian uint32, the form that keys hash and files hold."""
    packed = array("I", tokens)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def unpack_tokens(data: bytes) -> list[int]:
    """The inverse of `pack_tokens`. Raises ValueError when `data` is not whole uint32s."""
    unpacked = array("I")
    unpacked.frombytes(data)
    if sys.byteorder == "big":
        unpacked.byteswap()
    return unpacked.tolist()


def namespace_of(*parts: str) -> Namespace:
    """Fingerprint of `parts`, in order; no two different lists of parts collide by concatenation."""
    digest = hashlib.blake2b(digest_size=NAMESPACE_NBYTES)
    for part in parts:
        encoded = part.encode()
        digest.update(len(encoded).to_bytes(8, "little"))
        digest.update(encoded)
    return Namespace(digest.digest())


def block_key(namespace: Namespace, parent: BlockKey, tokens: Iterable[int]) -> BlockKey:
    """Name of the block that holds `tokens` right after the chain that ends in `parent`."""
    return packed_block_key(namespace, parent, pack_tokens(tokens))


def packed_block_key(namespace: Namespace, parent: BlockKey, packed_tokens: bytes) -> BlockKey:
    """`block_key` for tokens that are packed already."""
    digest = hashlib.blake2b(parent, digest_size=KEY_NBYTES, person=namespace)
    digest.update(packed_tokens)
    return BlockKey(digest.digest())


@dataclass(frozen=True, slots=True)
class Link:
    """One block of a chain by name and content: what history is made of, with or without its KV."""

    key: BlockKey
    parent: BlockKey
    tokens: tuple[int, ...]


def chain_links(namespace: Namespace, tokens: Tokens, block_size: int) -> Iterator[Link]:
    """The links of `tokens` cut into blocks of `block_size`; the last one may be shorter."""
    parent = ROOT
    for start in range(0, len(tokens), block_size):
        run = tuple(tokens[start : start + block_size])
        key = block_key(namespace, parent, run)
        yield Link(key, parent, run)
        parent = key


def common_prefix(left: Tokens, right: Tokens) -> int:
    """How many leading tokens are equal."""
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index
    return min(len(left), len(right))
