"""The store that the settings describe."""

from __future__ import annotations

from dormouse.settings import Settings
from dormouse.store.block_store import BlockStore
from dormouse.store.encryption import refuse_key_in_folder
from dormouse.store.master_key import KeySource, MasterKeyFile, MasterKeyring


def open_store(settings: Settings) -> BlockStore:
    """Own the data folder. Raises StoreError; the caller closes it."""
    return BlockStore.open(
        settings.data_dir, quota_nbytes=settings.disk_quota_nbytes, key_source=key_source(settings)
    )


def key_source(settings: Settings) -> KeySource | None:
    """Where the master key of the data folder is; None when it is not to be encrypted. Raises
    EncryptionMismatch for a key file within the folder."""
    if settings.encryption == "off":
        return None
    if settings.encryption == "keyring":
        return MasterKeyring()
    refuse_key_in_folder(settings.encryption_key_file, settings.data_dir)
    return MasterKeyFile(settings.encryption_key_file)
