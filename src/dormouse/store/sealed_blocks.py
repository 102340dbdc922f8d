"""Sealed block files: still safetensors, still aligned, and nothing in them means anything without the key.

    8 bytes         length n of the header, little-endian
    n bytes         header: JSON, padded with spaces until 8 + n is a multiple of 4096
    block_nbytes    tensor `payload`: the ciphertext of a page's bytes
    16 + 12         tensor `seal`: tag and nonce of the payload
    the rest        tensor `tokens`: parent, checksum and tokens, sealed

The header is authenticated with both, and both tags are checked at every load: of a file that was
changed, cut, or put in another's place, one does not match. So a load computes no checksum.
"""

from __future__ import annotations

import json
import os
import secrets
import threading

from dormouse.domain.blocks import KEY_NBYTES, NAMESPACE_NBYTES, ROOT, BlockKey, Namespace, packed_block_key
from dormouse.domain.cache_spec import CacheSpec
from dormouse.domain.errors import DamagedBlock, KeyUnknown, SealBroken
from dormouse.store.files import (
    LENGTH_NBYTES,
    MAX_HEADER_NBYTES,
    SEALED_FORMAT,
    TOKEN_NBYTES,
    BlockFormat,
    BlockHeader,
    pad_header,
    read_exactly,
    tensor_entry,
)
from dormouse.store.rows import BlockRow
from dormouse.store.vault import KEY_ID_NBYTES, NONCE_NBYTES, SEAL_NBYTES, TAG_NBYTES, TenantKey, Vault

_CHECKSUM_NBYTES = 16
_TRAILER_NBYTES = TAG_NBYTES + NONCE_NBYTES
_FIXED_TAIL_NBYTES = 1 + KEY_NBYTES + _CHECKSUM_NBYTES


class SealedBlocks:
    """See `BlockCodec`. One instance serves all threads; the scratch memory is each thread's own."""

    def __init__(self, vault: Vault) -> None:
        self._vault = vault
        self._scratch = threading.local()

    def parts(
        self,
        block_format: BlockFormat,
        namespace: Namespace,
        key: BlockKey,
        parent: BlockKey,
        tokens: bytes,
        payload: bytes,
        checksum: str,
    ) -> tuple[bytes, ...]:
        """See `BlockCodec`."""
        owner = self._vault.key_of(namespace)
        tail = _pack_tail(parent, checksum, tokens)
        head = _head(block_format.cache, namespace, owner, len(tail) + SEAL_NBYTES)
        nonce = secrets.token_bytes(NONCE_NBYTES)
        sealed = owner.contents.encrypt(nonce, payload, _payload_place(head, key))
        return head, sealed, nonce, self._vault.seal(owner, tail, _tail_place(head))

    def load(self, fd: int, row: BlockRow, block_format: BlockFormat, into: memoryview) -> None:
        """See `BlockCodec`."""
        head = self.head(row, block_format)
        found_head = bytearray(len(head))
        sealed = self._buffer(len(into) + _TRAILER_NBYTES)
        tail = bytearray(_tail_nbytes(row.tokens))
        if os.fstat(fd).st_size != row.nbytes:
            raise DamagedBlock("size differs from the catalog's")
        read_exactly(fd, [found_head, sealed, tail], 0)
        if found_head != head:
            raise DamagedBlock("header differs from what it is to be")
        _decrypt(self._vault.key_of(row.namespace), sealed, _payload_place(head, row.key), into)
        if self._open_tail(tail, head) != (row.parent, row.checksum, row.tokens):
            raise DamagedBlock("tokens differ from the catalog's")

    def identify(self, fd: int) -> tuple[BlockHeader, bytes]:
        """See `BlockCodec`. Raises KeyDestroyed too."""
        header, tokens, _ = self._identify(fd)
        return header, tokens

    def payload(self, fd: int) -> tuple[BlockHeader, bytes, bytearray]:
        """See `BlockCodec`. Raises KeyDestroyed too."""
        header, tokens, head = self._identify(fd)
        sealed = bytearray(header.payload_nbytes + _TRAILER_NBYTES)
        read_exactly(fd, [sealed], header.payload_start)
        opened = bytearray(header.payload_nbytes)
        owner = self._vault.key_of(header.namespace)
        _decrypt(owner, memoryview(sealed), _payload_place(head, header.key), memoryview(opened))
        return header, tokens, opened

    def head(self, row: BlockRow, block_format: BlockFormat) -> bytes:
        """See `BlockCodec`."""
        owner = self._vault.key_of(row.namespace)
        return _head(block_format.cache, row.namespace, owner, _tail_nbytes(row.tokens))

    def _identify(self, fd: int) -> tuple[BlockHeader, bytes, bytes]:
        file_nbytes = os.fstat(fd).st_size
        length = bytearray(LENGTH_NBYTES)
        read_exactly(fd, [length], 0)
        payload_start = LENGTH_NBYTES + int.from_bytes(length, "little")
        if payload_start > min(MAX_HEADER_NBYTES, file_nbytes):
            raise DamagedBlock(f"header of {payload_start} bytes in a file of {file_nbytes}")
        found_head = bytearray(payload_start)
        read_exactly(fd, [found_head], 0)
        namespace, cache, key_id = _parse(bytes(found_head[LENGTH_NBYTES:]))
        try:
            owner = self._vault.key(key_id)
        except KeyUnknown as error:
            raise DamagedBlock("it was sealed with a key that is not known here") from error
        tail_nbytes = file_nbytes - payload_start - cache.block_nbytes - _TRAILER_NBYTES
        head = _head(cache, namespace, owner, tail_nbytes)
        if tail_nbytes <= SEAL_NBYTES + _FIXED_TAIL_NBYTES or found_head != head:
            raise DamagedBlock("header differs from what it is to be")
        tail = bytearray(tail_nbytes)
        read_exactly(fd, [tail], file_nbytes - tail_nbytes)
        parent, checksum, tokens = self._open_tail(tail, head)
        self._vault.own(namespace, owner.tenant)
        num_tokens = len(tokens) // TOKEN_NBYTES
        key = packed_block_key(namespace, parent, tokens)
        header = BlockHeader(
            namespace,
            key,
            parent,
            num_tokens,
            cache.fingerprint(),
            checksum,
            payload_start,
            cache.block_nbytes,
        )
        return header, tokens, head

    def _open_tail(self, tail: bytearray, head: bytes) -> tuple[BlockKey, str, bytes]:
        """Parent, checksum and packed tokens."""
        try:
            _, opened = self._vault.open(bytes(tail), _tail_place(head))
        except SealBroken as error:
            raise DamagedBlock(f"its tokens do not open: {error}") from error
        parent = BlockKey(opened[1 : 1 + KEY_NBYTES]) if opened[0] else ROOT
        checksum = opened[1 + KEY_NBYTES : _FIXED_TAIL_NBYTES]
        return parent, checksum.hex(), opened[_FIXED_TAIL_NBYTES:]

    def _buffer(self, nbytes: int) -> memoryview:
        """Memory of this thread, used again with every load."""
        buffer = getattr(self._scratch, "buffer", None)
        if buffer is None or len(buffer) != nbytes:
            self._scratch.buffer = buffer = memoryview(bytearray(nbytes))
        return buffer


def _decrypt(owner: TenantKey, sealed: memoryview, place: bytes, into: memoryview) -> None:
    """Ciphertext, tag and nonce into the page that they were. Raises DamagedBlock."""
    from cryptography.exceptions import InvalidTag

    try:
        owner.contents.decrypt_into(sealed[-NONCE_NBYTES:], sealed[:-NONCE_NBYTES], place, into)
    except InvalidTag:
        raise DamagedBlock("its payload was changed, or is another block's") from None


def _payload_place(head: bytes, key: BlockKey) -> bytes:
    return b"dormouse payload\0" + key + head


def _tail_place(head: bytes) -> bytes:
    return b"dormouse tokens\0" + head


def _pack_tail(parent: BlockKey, checksum: str, tokens: bytes) -> bytes:
    return bytes([bool(parent)]) + parent.ljust(KEY_NBYTES, b"\0") + bytes.fromhex(checksum) + tokens


def _tail_nbytes(tokens: bytes) -> int:
    return SEAL_NBYTES + _FIXED_TAIL_NBYTES + len(tokens)


def _head(cache: CacheSpec, namespace: Namespace, owner: TenantKey, tail_nbytes: int) -> bytes:
    """The bytes before the payload."""
    metadata = {
        "format": SEALED_FORMAT,
        "namespace": namespace.hex(),
        "key_id": owner.id.hex(),
        "cache": cache.fingerprint(),
    }
    tensors = []
    end = 0
    for name, nbytes in (
        ("payload", cache.block_nbytes),
        ("seal", _TRAILER_NBYTES),
        ("tokens", tail_nbytes),
    ):
        start, end = end, end + nbytes
        tensors.append(tensor_entry(name, "U8", (nbytes,), start, end))
    return pad_header(f'{{"__metadata__":{json.dumps(metadata)},{",".join(tensors)}}}'.encode())


def _parse(text: bytes) -> tuple[Namespace, CacheSpec, bytes]:
    """What the metadata of a header say; that the rest is right is seen by rendering it again."""
    try:
        metadata = json.loads(text.decode("ascii"))["__metadata__"]
        if metadata["format"] != SEALED_FORMAT:
            raise DamagedBlock(f"format {metadata['format']!r} is not {SEALED_FORMAT!r}")
        namespace = Namespace(bytes.fromhex(metadata["namespace"]))
        key_id = bytes.fromhex(metadata["key_id"])
        cache = CacheSpec.parse(metadata["cache"])
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedBlock("header is not that of a sealed block") from error
    if len(namespace) != NAMESPACE_NBYTES or len(key_id) != KEY_ID_NBYTES:
        raise DamagedBlock("namespace or key id has another size")
    return namespace, cache, key_id
