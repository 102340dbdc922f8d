"""The keys of an encrypted data folder, and what is sealed with them.

    master key    outside of the folder; see `master_key`
    wrapping key  derived from it for this folder; encrypts the data keys in `vault.json`
    data key      random, one per tenant; destroying it is deleting the tenant
    sealing keys  derived from a data key: AES-256-GCM for contents, AES-256-SIV for names

Contents are sealed under random 96-bit nonces. After 2**32 values under one key, chance repeats a nonce with
probability 2**-32: that is the bound to keep. Deriving nonces from block keys would not be safe, as a tail is
computed again, and on some devices to other bytes. Names are sealed without a nonce, equal ones alike, so
that they can be looked up. What a value belongs to is authenticated with it: values cannot change places.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dormouse.domain.blocks import Namespace
from dormouse.domain.errors import (
    EncryptionMismatch,
    KeyDestroyed,
    KeyUnknown,
    SealBroken,
    StoreError,
)
from dormouse.store.file_ops import FileOps
from dormouse.store.vault_file import VaultFile, VaultState, read_vault

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM, AESSIV

KEY_ID_NBYTES = 8
NONCE_NBYTES = 12
TAG_NBYTES = 16
SEAL_NBYTES = KEY_ID_NBYTES + NONCE_NBYTES + TAG_NBYTES
"""What sealing adds to a content."""
KEY_NBYTES = 32
NOBODY = ""
"""The tenant of what belongs to none: names of blocks, identities of models."""


@dataclass(frozen=True, slots=True, repr=False)
class TenantKey:
    """The sealing keys of one tenant. Shows nothing of itself."""

    id: bytes
    tenant: str
    contents: AESGCM
    names: AESSIV

    def __repr__(self) -> str:
        return f"TenantKey({self.id.hex()})"


class Vault:
    """Seals and opens. Only the owner of the store seals with a tenant's key for the first time, makes or
    destroys one; any thread may open.

    Methods raise SealBroken for what was not sealed like this, and OSError when a new key cannot be kept.
    """

    def __init__(self, file: VaultFile, wrapping: AESGCM, document: dict[str, Any]) -> None:
        """Use `open_vault` or `create_vault`."""
        self._file = file
        self._wrapping = wrapping
        self.store_id: str = document["store"]
        self._state = VaultState(document["state"])
        self.generation: int = document["generation"]
        """How many times a key was made or destroyed. The catalog knows it, too, and tells an older file."""
        self._wrapped = {
            bytes.fromhex(key_id): bytes.fromhex(key) for key_id, key in document["keys"].items()
        }
        self.destroyed = frozenset(bytes.fromhex(key_id) for key_id in document["destroyed"])
        self._keys = {key_id: self._unwrap(key_id, wrapped) for key_id, wrapped in self._wrapped.items()}
        self._tenants = {key.tenant: key for key in self._keys.values()}
        self._owners: dict[Namespace, str] = {}

    @property
    def state(self) -> VaultState:
        """Whether the folder is encrypted, or on the way to or from it."""
        return self._state

    @state.setter
    def state(self, state: VaultState) -> None:
        self._state = state
        self._write()

    @property
    def tenants(self) -> list[str]:
        """Who has a key here."""
        return sorted(self._tenants.keys() - {NOBODY})

    def own(self, namespace: Namespace, tenant: str) -> None:
        """Say whose the blocks and replies of a namespace are."""
        self._owners[namespace] = tenant

    def has_owner(self, namespace: Namespace) -> bool:
        """Whether it is known whose the namespace is."""
        return namespace in self._owners

    def key_of(self, namespace: Namespace) -> TenantKey:
        """The key of the tenant whose namespace it is, made if there is none."""
        return self.tenant_key(self._owners[namespace])

    def tenant_key(self, tenant: str) -> TenantKey:
        """The key of a tenant, made if there is none."""
        return self._tenants.get(tenant) or self._create(tenant)

    def find_tenant(self, tenant: str) -> TenantKey | None:
        """The key of a tenant, if there is one."""
        return self._tenants.get(tenant)

    def key(self, id: bytes) -> TenantKey:
        """The key of that id. Raises KeyDestroyed, and KeyUnknown for one never seen."""
        found = self._keys.get(id)
        if found is not None:
            return found
        if id in self.destroyed:
            raise KeyDestroyed("its tenant's key was destroyed")
        raise KeyUnknown(f"{self._file.path.name} has no key {id.hex()}")

    def seal(self, key: TenantKey, content: bytes, place: bytes) -> bytes:
        """Id of the key, a new nonce, ciphertext, tag. Who opens it must tell the same `place`."""
        nonce = secrets.token_bytes(NONCE_NBYTES)
        return key.id + nonce + key.contents.encrypt(nonce, content, place)

    def open(self, sealed: bytes, place: bytes) -> tuple[TenantKey, bytes]:
        """Whose it is, and what was sealed."""
        from cryptography.exceptions import InvalidTag

        if len(sealed) < SEAL_NBYTES:
            raise SealBroken("it is too short")
        key = self.key(bytes(sealed[:KEY_ID_NBYTES]))
        nonce = sealed[KEY_ID_NBYTES : KEY_ID_NBYTES + NONCE_NBYTES]
        try:
            return key, key.contents.decrypt(nonce, sealed[KEY_ID_NBYTES + NONCE_NBYTES :], place)
        except InvalidTag:
            raise SealBroken("it was changed, or belongs elsewhere") from None

    def seal_name(self, key: TenantKey, name: bytes, place: bytes) -> bytes:
        """`name` so that equal names in one place look alike."""
        # SIV takes no empty text.
        return key.names.encrypt(b"\0" + name, [place])

    def open_name(self, key: TenantKey, sealed: bytes, place: bytes) -> bytes:
        """The inverse of `seal_name`."""
        from cryptography.exceptions import InvalidTag

        try:
            return key.names.decrypt(sealed, [place])[1:]
        except (InvalidTag, ValueError):
            raise SealBroken("a name was changed, or belongs elsewhere") from None

    def destroy(self, tenant: str) -> bool:
        """Destroy a tenant's key: what was sealed with it is gone. Whether there was one. Raises OSError."""
        key = self._tenants.get(tenant)
        if key is None or tenant == NOBODY:
            return False
        del self._tenants[tenant], self._keys[key.id], self._wrapped[key.id]
        self.destroyed |= {key.id}
        self.generation += 1
        self._write()
        return True

    def clean(self) -> None:
        """Remove what a crash left of an earlier file. Raises OSError."""
        self._file.clean()

    def remove(self) -> None:
        """Destroy all keys: the folder is encrypted no more. Raises OSError."""
        self._file.remove()

    def _create(self, tenant: str) -> TenantKey:
        key_id = secrets.token_bytes(KEY_ID_NBYTES)
        nonce = secrets.token_bytes(NONCE_NBYTES)
        raw = secrets.token_bytes(KEY_NBYTES)
        self._wrapped[key_id] = nonce + self._wrapping.encrypt(
            nonce, raw + tenant.encode(), self._wrap_place(key_id)
        )
        self.generation += 1
        try:
            self._write()
        except OSError:
            del self._wrapped[key_id]
            self.generation -= 1
            raise
        self._keys[key_id] = key = _tenant_key(key_id, tenant, raw)
        self._tenants[tenant] = key
        return key

    def _unwrap(self, id: bytes, wrapped: bytes) -> TenantKey:
        from cryptography.exceptions import InvalidTag

        nonce, sealed = wrapped[:NONCE_NBYTES], wrapped[NONCE_NBYTES:]
        try:
            opened = self._wrapping.decrypt(nonce, sealed, self._wrap_place(id))
        except InvalidTag:
            raise EncryptionMismatch(
                f"the master key is not that of {self._file.path.parent} (store {self.store_id}); "
                "give the right one, or choose another data folder. Nothing was changed"
            ) from None
        return _tenant_key(id, opened[KEY_NBYTES:].decode(), opened[:KEY_NBYTES])

    def _wrap_place(self, id: bytes) -> bytes:
        return b"dormouse data key\0" + bytes.fromhex(self.store_id) + id

    def _write(self) -> None:
        """The file anew, in one piece; the bytes of the one before are overwritten."""
        document = {
            "store": self.store_id,
            "state": self._state,
            "generation": self.generation,
            "keys": {key_id.hex(): wrapped.hex() for key_id, wrapped in self._wrapped.items()},
            "destroyed": sorted(key_id.hex() for key_id in self.destroyed),
        }
        self._file.write(document)


def open_vault(root: Path, ops: FileOps, master: bytearray) -> Vault:
    """The vault of an encrypted folder; `master` is overwritten.

    Raises EncryptionMismatch for another key, StoreError for a file that cannot be used. Changes nothing.
    """
    document = read_vault(root)
    return Vault(VaultFile(root, ops), _wrapping_key(master, document["store"]), document)


def create_vault(root: Path, ops: FileOps, master: bytearray, store_id: str, state: VaultState) -> Vault:
    """A new vault, on disk on return; `master` is overwritten. Raises OSError."""
    document = {"store": store_id, "state": state, "generation": 0, "keys": {}, "destroyed": []}
    vault = Vault(VaultFile(root, ops), _wrapping_key(master, store_id), document)
    vault.tenant_key(NOBODY)
    return vault


def new_store_id() -> str:
    """A name for a folder's keys."""
    return secrets.token_hex(8)


def _wrapping_key(master: bytearray, store_id: str) -> AESGCM:
    aead = _import_aead()
    try:
        return aead.AESGCM(_derive(bytes(master), b"wrapping", KEY_NBYTES, bytes.fromhex(store_id)))  # type: ignore[no-any-return]
    finally:
        master[:] = bytes(len(master))


def _tenant_key(id: bytes, tenant: str, raw: bytes) -> TenantKey:
    aead = _import_aead()
    contents = aead.AESGCM(_derive(raw, b"contents", KEY_NBYTES, id))
    return TenantKey(id, tenant, contents, aead.AESSIV(_derive(raw, b"names", 2 * KEY_NBYTES, id)))


def _derive(secret: bytes, what: bytes, nbytes: int, salt: bytes) -> bytes:
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    return HKDF(SHA256(), nbytes, salt, b"dormouse " + what).derive(secret)


def _import_aead() -> Any:
    # Imported here: a store that is not encrypted needs none of it.
    try:
        from cryptography.hazmat.primitives.ciphers import aead
    except ImportError as error:
        raise StoreError(
            "encryption needs the package cryptography: `pip install 'dormouse[encryption]'`"
        ) from error
    return aead
