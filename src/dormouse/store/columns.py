"""What the catalog's columns hold of names and contents: the things themselves, or what is sealed of them.

Numbers, times, flags and the hashes of namespaces stand in the catalog as they are, sealed or not.
"""

from __future__ import annotations

from typing import Protocol

from dormouse.domain.blocks import BlockKey, Namespace
from dormouse.domain.errors import SealBroken
from dormouse.store.vault import NOBODY, SEAL_NBYTES, TenantKey, Vault

_CHECKSUM_LENGTH_NBYTES = 1


class Columns(Protocol):
    """How values become columns and come back. What comes back raises SealBroken."""

    @property
    def generation(self) -> int:
        """Grows with every key that is made or destroyed; 0 where nothing is sealed."""

    def key(self, key: bytes) -> bytes:
        """The column of a block's or a reply's key, or of a parent."""

    def from_key(self, column: bytes) -> BlockKey:
        """The inverse of `key`."""

    def tenant(self, tenant: str) -> str:
        """The column of a tenant."""

    def from_tenant(self, column: str) -> str:
        """The inverse of `tenant`."""

    def name(self, tenant: str, name: str, place: str) -> str:
        """The column of a tenant's name of something; equal names are equal columns."""

    def from_name(self, tenant: str, column: str, place: str) -> str:
        """The inverse of `name`."""

    def content(self, tenant: str, content: bytes, place: bytes) -> bytes:
        """The column of a tenant's content. `place` says where it belongs."""

    def from_content(self, column: bytes, place: bytes) -> bytes:
        """The inverse of `content`."""

    def content_nbytes(self, column_nbytes: int) -> int:
        """Bytes of a content whose column has so many."""

    def block(self, namespace: Namespace, key: BlockKey, tokens: bytes, checksum: str) -> tuple[bytes, str]:
        """The columns of a block's tokens and checksum."""

    def from_block(
        self, namespace: Namespace, key: BlockKey, tokens: bytes, checksum: str
    ) -> tuple[bytes, str]:
        """The inverse of `block`."""

    def reply(self, namespace: Namespace, key: bytes, tokens: bytes) -> bytes:
        """The column of a reply's tokens."""

    def from_reply(self, namespace: Namespace, key: bytes, column: bytes) -> bytes:
        """The inverse of `reply`."""


class PlainColumns:
    """Everything as it is."""

    generation = 0

    def key(self, key: bytes) -> bytes:
        """See `Columns`."""
        return key

    def from_key(self, column: bytes) -> BlockKey:
        """See `Columns`."""
        return BlockKey(column)

    def tenant(self, tenant: str) -> str:
        """See `Columns`."""
        return tenant

    def from_tenant(self, column: str) -> str:
        """See `Columns`."""
        return column

    def name(self, tenant: str, name: str, place: str) -> str:
        """See `Columns`."""
        del tenant, place
        return name

    def from_name(self, tenant: str, column: str, place: str) -> str:
        """See `Columns`."""
        del tenant, place
        return column

    def content(self, tenant: str, content: bytes, place: bytes) -> bytes:
        """See `Columns`."""
        del tenant, place
        return content

    def from_content(self, column: bytes, place: bytes) -> bytes:
        """See `Columns`."""
        del place
        return column

    def content_nbytes(self, column_nbytes: int) -> int:
        """See `Columns`."""
        return column_nbytes

    def block(self, namespace: Namespace, key: BlockKey, tokens: bytes, checksum: str) -> tuple[bytes, str]:
        """See `Columns`."""
        del namespace, key
        return tokens, checksum

    from_block = block

    def reply(self, namespace: Namespace, key: bytes, tokens: bytes) -> bytes:
        """See `Columns`."""
        del namespace, key
        return tokens

    from_reply = reply


class SealedColumns:
    """Names and contents sealed by their tenants' keys; a tenant's column is the id of its key."""

    def __init__(self, vault: Vault) -> None:
        self._vault = vault

    @property
    def generation(self) -> int:
        """See `Columns`."""
        return self._vault.generation

    def key(self, key: bytes) -> bytes:
        """See `Columns`. Keys are hashes of text: as they are, they would confirm a guess."""
        return seal_key(self._vault, key) if key else key

    def from_key(self, column: bytes) -> BlockKey:
        """See `Columns`."""
        if not column:
            return BlockKey(column)
        return BlockKey(self._vault.open_name(self._vault.tenant_key(NOBODY), column, b"key"))

    def tenant(self, tenant: str) -> str:
        """See `Columns`."""
        return self._vault.tenant_key(tenant).id.hex()

    def from_tenant(self, column: str) -> str:
        """See `Columns`."""
        return self._vault.key(_unhex(column)).tenant

    def name(self, tenant: str, name: str, place: str) -> str:
        """See `Columns`."""
        return self._vault.seal_name(self._vault.tenant_key(tenant), name.encode(), place.encode()).hex()

    def from_name(self, tenant: str, column: str, place: str) -> str:
        """See `Columns`."""
        key = self._vault.tenant_key(tenant)
        return self._vault.open_name(key, _unhex(column), place.encode()).decode()

    def content(self, tenant: str, content: bytes, place: bytes) -> bytes:
        """See `Columns`."""
        return self._vault.seal(self._vault.tenant_key(tenant), content, place)

    def from_content(self, column: bytes, place: bytes) -> bytes:
        """See `Columns`."""
        return self._vault.open(column, place)[1]

    def content_nbytes(self, column_nbytes: int) -> int:
        """See `Columns`."""
        return max(0, column_nbytes - SEAL_NBYTES)

    def block(self, namespace: Namespace, key: BlockKey, tokens: bytes, checksum: str) -> tuple[bytes, str]:
        """See `Columns`. The checksum, which is no cryptographic one, is sealed with the tokens."""
        text = checksum.encode()
        content = bytes([len(text)]) + text + tokens
        return self._vault.seal(self._vault.key_of(namespace), content, _place("block", namespace, key)), ""

    def from_block(
        self, namespace: Namespace, key: BlockKey, tokens: bytes, checksum: str
    ) -> tuple[bytes, str]:
        """See `Columns`."""
        del checksum
        _, content = self._open_owned(namespace, tokens, _place("block", namespace, key))
        end = _CHECKSUM_LENGTH_NBYTES + content[0]
        return content[end:], content[_CHECKSUM_LENGTH_NBYTES:end].decode()

    def reply(self, namespace: Namespace, key: bytes, tokens: bytes) -> bytes:
        """See `Columns`."""
        return self._vault.seal(self._vault.key_of(namespace), tokens, _place("reply", namespace, key))

    def from_reply(self, namespace: Namespace, key: bytes, column: bytes) -> bytes:
        """See `Columns`."""
        return self._open_owned(namespace, column, _place("reply", namespace, key))[1]

    def _open_owned(self, namespace: Namespace, column: bytes, place: bytes) -> tuple[TenantKey, bytes]:
        """Whose it is shows in it, and so does whose its namespace is."""
        owner, content = self._vault.open(column, place)
        self._vault.own(namespace, owner.tenant)
        return owner, content


def seal_key(vault: Vault, key: bytes) -> bytes:
    """What a block is called in an encrypted store, in its catalog and as a file."""
    return vault.seal_name(vault.tenant_key(NOBODY), key, b"key")


def _place(what: str, namespace: Namespace, key: bytes) -> bytes:
    return what.encode() + b"\0" + namespace + key


def _unhex(column: str) -> bytes:
    try:
        return bytes.fromhex(column)
    except ValueError:
        raise SealBroken("a name is not in its encrypted form") from None
