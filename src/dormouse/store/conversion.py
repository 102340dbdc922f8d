"""A data folder made encrypted, or plain again: all of it is written anew beside what is there.

`vault.json` says how far that is, so each step begins with one rename, and a command that was cut goes on:

| state             | counts    | is being done                         |
| ----------------- | --------- | ------------------------------------- |
| `encrypting`      | plain     | the encrypted store is written        |
| `wiping_plain`    | encrypted | the plain one is overwritten and goes |
| `on`              | encrypted |                                       |
| `decrypting`      | encrypted | the plain store is written            |
| `dropping_sealed` | plain     | the encrypted one goes, the keys last |

The folder must be free, and the disk must have room for both stores.
"""

from __future__ import annotations

import logging
import os
import shutil
import sqlite3
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from dormouse.domain.agents import DEFAULT_TENANT
from dormouse.domain.blocks import Namespace
from dormouse.domain.cache_spec import CacheSpec
from dormouse.domain.errors import DamagedBlock, EncryptionMismatch, StoreError
from dormouse.store.encryption import layout_of, make_vault, unlock, unlock_sealed
from dormouse.store.file_ops import FileOps
from dormouse.store.files import BlockFormat, open_block
from dormouse.store.identity import IDENTITY_KIND, Identity
from dormouse.store.layout import Layout
from dormouse.store.master_key import KeySource
from dormouse.store.opening import StoreParts, assemble, lock_folder
from dormouse.store.options import StoreOptions
from dormouse.store.rows import BlockRow, Change, DocumentId, DocumentRow
from dormouse.store.vault import Vault
from dormouse.store.vault_file import VaultState, has_vault, read_vault
from dormouse.store.view import PendingBlock

log = logging.getLogger(__name__)

_BATCH_NBYTES = 16 << 20
_BATCH_ROWS = 1000
_ROOM_SHARE = 1.1
"""Of what is stored, to have free."""


@dataclass(frozen=True, slots=True)
class Converted:
    """What was carried over. `num_lost` blocks were damaged or of nobody known; they are computed again."""

    num_blocks: int
    nbytes: int
    num_agents: int
    num_lost: int


class Conversion:
    """One data folder, to be converted by the process that owns it. Use it once."""

    def __init__(
        self, folder: Path, key_source: KeySource, *, quota_nbytes: int, file_ops: FileOps | None = None
    ) -> None:
        self._folder = folder
        self._source = key_source
        self._ops = file_ops or FileOps()
        self._bounds = StoreOptions().bounds(quota_nbytes)

    def encrypt(self) -> Converted:
        """Make the folder encrypted. Raises StoreError; what was cut or failed goes on with the next call."""
        with self._owned():
            state = self._state()
            if state is VaultState.ON:
                raise EncryptionMismatch(f"{self._folder} is encrypted already")
            if state in (VaultState.DECRYPTING, VaultState.DROPPING_SEALED):
                raise EncryptionMismatch(
                    f"{self._folder} is being decrypted; run `dormouse store decrypt` first"
                )
            if state is None:
                self._check_quarantine()
                vault = make_vault(self._folder, self._ops, self._source, VaultState.ENCRYPTING)
            else:
                vault = unlock_sealed(self._folder, self._ops, self._source)
                vault.clean()
            done = Converted(0, 0, 0, 0)
            if vault.state is VaultState.ENCRYPTING:
                self._clear(layout_of(self._folder, vault), wipe=False)
                done = self._copy(None, vault)
                self._check_quarantine()  # opening the plain store may have set something aside
                vault.state = VaultState.WIPING_PLAIN
            self._clear(Layout(self._folder), wipe=True)
            vault.state = VaultState.ON
            return done

    def decrypt(self) -> Converted:
        """Make the folder plain again. Raises as `encrypt` does."""
        with self._owned():
            state = self._state()
            if state is None:
                raise EncryptionMismatch(f"{self._folder} is not encrypted")
            if state in (VaultState.ENCRYPTING, VaultState.WIPING_PLAIN):
                raise EncryptionMismatch(
                    f"{self._folder} is being encrypted; run `dormouse store encrypt` first"
                )
            vault = unlock_sealed(self._folder, self._ops, self._source)
            vault.clean()
            done = Converted(0, 0, 0, 0)
            if vault.state is VaultState.ON:
                self._check_quarantine()
                vault.state = VaultState.DECRYPTING
            if vault.state is VaultState.DECRYPTING:
                self._clear(Layout(self._folder), wipe=True)
                done = self._copy(vault, None)
                vault.state = VaultState.DROPPING_SEALED
            self._clear(layout_of(self._folder, vault), wipe=False)
            vault.remove()
            return done

    @contextmanager
    def _owned(self) -> Iterator[None]:
        """The folder is ours meanwhile. Raises StoreError for what a disk can do."""
        with ExitStack() as owned:
            try:
                owned.callback(lock_folder(self._folder, self._ops).release)
                yield
            except (OSError, sqlite3.Error) as error:
                raise StoreError(
                    f"the conversion of {self._folder} failed: {error}; mend that and run it again"
                ) from error

    def _state(self) -> VaultState | None:
        if has_vault(self._folder):
            return VaultState(read_vault(self._folder)["state"])
        return None

    def _check_quarantine(self) -> None:
        folder = Layout(self._folder).quarantine
        if folder.is_dir() and any(folder.iterdir()):
            raise StoreError(
                f"{folder} holds files that could not be trusted; look at them, remove them, run this again"
            )

    def _copy(self, before: Vault | None, after: Vault | None) -> Converted:
        with ExitStack() as opened:
            source = self._assemble(opened, before)
            self._check_room(source)
            return _Copy(source, self._assemble(opened, after)).run()

    def _assemble(self, opened: ExitStack, vault: Vault | None) -> StoreParts:
        parts = assemble(self._folder, self._ops, self._bounds, time.time(), vault)
        opened.callback(parts.catalog.close)
        return parts

    def _check_room(self, source: StoreParts) -> None:
        needed = int(source.ledger.total * _ROOM_SHARE)
        free = shutil.disk_usage(self._folder).free
        if free < needed:
            raise StoreError(
                f"converting needs {needed} free bytes on the disk of {self._folder}, {free} are free; "
                "free some, or lower the store with --disk-quota-gb first"
            )

    def _clear(self, layout: Layout, *, wipe: bool) -> None:
        """Remove a store's files; with `wipe` what they held is overwritten."""
        for path in (*_files_below(layout.blocks), *layout.catalog_files):
            if wipe:
                self._ops.wipe(path)
            self._ops.unlink(path)
        if layout.blocks.exists():
            shutil.rmtree(layout.blocks)
        self._ops.fsync_folder(layout.root)


class _Copy:
    """Everything of one open store into another, empty one."""

    def __init__(self, source: StoreParts, target: StoreParts) -> None:
        self._source = source
        self._target = target
        self._formats: dict[str, BlockFormat] = {}
        self._owners = _owners(source)
        self._num_lost = 0

    def run(self) -> Converted:
        """Blocks first, then who refers to them."""
        if self._target.vault is not None:
            for namespace, tenant in self._owners.items():
                self._target.vault.own(namespace, tenant)
        for batch in self._batches():
            self._target.keeper.add(batch)
        self._copy_history()
        self._copy_documents()
        replies = dict(self._source.catalog.replies())
        owned = {who: row for who, row in replies.items() if self._is_owned(who.namespace)}
        self._commit(Change(replies={**owned}))
        index = self._source.index
        tags = {tag.id: tag for tags in index.checkpoints.values() for tag in tags.values()}
        self._commit(Change(agents=dict(index.agents), checkpoints=tags))
        self._target.catalog.trim(limit_nbytes=0)
        stored = [row for row in self._target.index.blocks.values() if row.nbytes]
        nbytes = sum(row.nbytes for row in stored)
        return Converted(len(stored), nbytes, len(index.agents), self._num_lost)

    def _batches(self) -> Iterator[list[PendingBlock]]:
        batch: list[PendingBlock] = []
        nbytes = 0
        # Parents first, so that each block knows how many tokens are before it.
        for row in sorted(self._source.index.blocks.values(), key=lambda row: row.num_before):
            block = self._read(row) if row.nbytes else None
            if block is None:
                self._num_lost += row.nbytes > 0
                continue
            batch.append(block)
            nbytes += len(block.payload)
            if nbytes >= _BATCH_NBYTES:
                yield batch
                batch, nbytes = [], 0
        if batch:
            yield batch

    def _read(self, row: BlockRow) -> PendingBlock | None:
        if not self._is_owned(row.namespace):
            return None
        try:
            fd = open_block(self._source.layout.block(row.namespace, row.key))
            try:
                header, tokens, payload = self._source.codec.payload(fd)
            finally:
                os.close(fd)
        except (DamagedBlock, FileNotFoundError) as error:
            log.error("block %s is left out: %s", row.key.hex(), error)
            return None
        if (header.key, tokens) != (row.key, row.tokens):
            log.error("block %s is left out: file and catalog differ", row.key.hex())
            return None
        block_format = self._formats.setdefault(header.cache, BlockFormat(CacheSpec.parse(header.cache)))
        return PendingBlock(row.namespace, row.link, tokens, bytes(payload), block_format, row.used_at)

    def _copy_history(self) -> None:
        """Rows of blocks whose payload is not there, or was not carried over."""
        here = self._target.index.blocks
        reachable = self._source.index.reachable(self._source.index.refs())
        rows = [
            row.without_payload()
            for key, row in self._source.index.blocks.items()
            if key not in here and key in reachable
        ]
        for start in range(0, len(rows), _BATCH_ROWS):
            self._commit(Change(rows={row.key: row for row in rows[start : start + _BATCH_ROWS]}))

    def _copy_documents(self) -> None:
        for document, created_at, used_at, _ in self._source.catalog.documents():
            body = self._source.catalog.document(document)
            if body is not None:
                self._commit(Change(documents={document: DocumentRow(body, created_at, used_at)}))

    def _is_owned(self, namespace: Namespace) -> bool:
        return self._target.vault is None or namespace in self._owners

    def _commit(self, change: Change) -> None:
        if change.num_rows:
            self._target.keeper.commit(change)


def _owners(source: StoreParts) -> dict[Namespace, str]:
    """Whose each namespace is: that of an agent is its tenant's, others are tried with the tenants known."""
    found = {agent.namespace: agent.tenant for agent in source.index.agents}
    documents: Iterable[DocumentId] = [document for document, *_ in source.catalog.documents()]
    tenants = {
        DEFAULT_TENANT,
        *found.values(),
        *(document.tenant for document in documents if document.tenant),
    }
    for document in documents:
        if document.kind != IDENTITY_KIND:
            continue
        body = source.catalog.document(document)
        if body is not None:
            identity = Identity.from_json(body)
            found |= {identity.namespace(tenant): tenant for tenant in tenants}
    return found


def destroy_tenant(folder: Path, key_source: KeySource, tenant: str, file_ops: FileOps | None = None) -> bool:
    """Destroy the key of an encrypted folder's tenant: all that it had is gone, also where copies of blocks
    or of the catalog are. What lies about is removed when the store is opened next. Whether there was one.

    Raises StoreLocked, EncryptionMismatch, StoreError.
    """
    ops = file_ops or FileOps()
    with ExitStack() as owned:
        try:
            owned.callback(lock_folder(folder, ops).release)
            if not has_vault(folder):
                raise EncryptionMismatch(
                    f"{folder} is not encrypted, so there is no key; `dormouse agents rm` deletes agents"
                )
            vault = unlock(folder, ops, key_source)
            assert vault is not None, "it has a vault"
            return vault.destroy(tenant)
        except OSError as error:
            raise StoreError(
                f"the key could not be destroyed: {error}; mend that and run it again"
            ) from error


def _files_below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if not path.is_dir()] if folder.is_dir() else []
