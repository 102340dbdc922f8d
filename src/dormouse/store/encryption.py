"""Whether a data folder is encrypted, and may be opened with the key that is given. Nothing is changed before
that is known."""

from __future__ import annotations

from pathlib import Path

from dormouse.domain.blocks import Namespace
from dormouse.domain.errors import EncryptionMismatch
from dormouse.store.columns import seal_key
from dormouse.store.file_ops import FileOps
from dormouse.store.layout import Layout
from dormouse.store.master_key import KeySource, find_or_create_key, require_key
from dormouse.store.vault import Vault, create_vault, new_store_id, open_vault
from dormouse.store.vault_file import VaultFile, VaultState, has_vault, read_vault

_UNFINISHED = {
    VaultState.ENCRYPTING: "encrypt",
    VaultState.WIPING_PLAIN: "encrypt",
    VaultState.DECRYPTING: "decrypt",
    VaultState.DROPPING_SEALED: "decrypt",
}


def layout_of(folder: Path, vault: Vault | None) -> Layout:
    """Where things lie in a folder with, or without, a vault."""
    if vault is None:
        return Layout(folder)
    return Layout(folder, lambda key: seal_key(vault, key))


def unlock(folder: Path, ops: FileOps, key_source: KeySource | None) -> Vault | None:
    """The vault of a folder; made for one that is empty, None for one that is not to be encrypted.

    Raises EncryptionMismatch when the folder is encrypted and `key_source` is None or has no or another
    key, or the other way round; StoreError and OSError.
    """
    if has_vault(folder):
        return _open(folder, ops, key_source)
    if _has_store(Layout(folder, bytes)):
        raise EncryptionMismatch(
            f"{folder} has an encrypted store, but its keys (vault.json) are gone; bring that file back "
            "from a copy, or choose another data folder. Nothing was changed"
        )
    VaultFile(folder, ops).clean()
    if key_source is None:
        return None
    if _has_store(Layout(folder)):
        raise EncryptionMismatch(
            f"{folder} is not encrypted; run `dormouse store encrypt` once, start with --encryption off, or "
            "choose another data folder. Nothing was changed"
        )
    return make_vault(folder, ops, key_source, VaultState.ON)


def make_vault(folder: Path, ops: FileOps, key_source: KeySource, state: VaultState) -> Vault:
    """A new vault, and a master key where there is none. Raises StoreError and OSError."""
    store_id = new_store_id()
    return create_vault(folder, ops, find_or_create_key(key_source, store_id), store_id, state)


def unlock_sealed(folder: Path, ops: FileOps, key_source: KeySource) -> Vault:
    """The vault of a folder that has one, in whatever state. Raises as `unlock` does."""
    return open_vault(folder, ops, require_key(key_source, read_vault(folder)["store"]))


def _open(folder: Path, ops: FileOps, key_source: KeySource | None) -> Vault:
    state = VaultState(read_vault(folder)["state"])
    if state in _UNFINISHED:
        raise EncryptionMismatch(
            f"the conversion of {folder} was cut; run `dormouse store {_UNFINISHED[state]}` again, which "
            "goes on with it. Nothing was changed"
        )
    if key_source is None:
        raise EncryptionMismatch(
            f"{folder} is encrypted; start with --encryption file (and --encryption-key-file) or "
            "--encryption keyring, wherever its key is, or choose another data folder. Nothing was changed"
        )
    vault = unlock_sealed(folder, ops, key_source)
    if _has_store(Layout(folder)):
        raise EncryptionMismatch(
            f"{folder} has an encrypted store and one that is not; move catalog.sqlite and blocks elsewhere. "
            "Nothing was changed"
        )
    vault.clean()
    return vault


def require_owner(vault: Vault | None, namespace: Namespace) -> None:
    """Raise ValueError for a namespace whose tenant an encrypted store was never told."""
    if vault is not None and not vault.has_owner(namespace):
        raise ValueError(f"namespace {namespace.hex()} is registered without its tenant")


def refuse_key_in_folder(path: Path, folder: Path) -> None:
    """Raise EncryptionMismatch for a key file within the data folder, where it protects nothing."""
    if path.absolute().resolve().is_relative_to(folder.absolute().resolve()):
        raise EncryptionMismatch(
            f"the key file {path} lies in the data folder that it is to protect; choose another place"
        )


def _has_store(layout: Layout) -> bool:
    return layout.catalog.exists() or (layout.blocks.is_dir() and any(layout.blocks.iterdir()))
