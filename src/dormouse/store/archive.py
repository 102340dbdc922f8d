"""One agent as one file: history, blocks, checkpoints and documents. A safetensors file of its own kind.

    8 bytes         length n of the header, little-endian
    n bytes         header: JSON, padded with spaces to a multiple of 8
    tokens          U32: the tokens of every block, one after the other
    documents       U8: the bodies of the documents, one after the other
    blocks          U8 [number, block_nbytes]: the payloads
    digest          U8 [32]: blake2b-256 of every byte before it

Names by content depend on the tenant, so the file has none: blocks are numbered, parents first, and their
keys are derived anew where they are imported.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any, BinaryIO, NoReturn

from pydantic_core import from_json

from dormouse.domain.agents import MAX_CHECKPOINTS, check_tag
from dormouse.domain.cache_spec import CacheSpec
from dormouse.domain.errors import ArchiveInvalid, ArchiveMismatch, InvalidRequest
from dormouse.store.files import LENGTH_NBYTES, TOKEN_NBYTES, payload_checksum
from dormouse.store.identity import Identity

KIND = "dormouse-agent"
VERSION = "1"
DIGEST_NBYTES = 32
MAX_HEADER_NBYTES = 8 << 20
_MAX_TIME = 1e11
"""In Unix seconds, some thousand years from now; a later one cannot be told as a date."""
_ALIGNMENT = 8
_TENSORS = ("tokens", "documents", "blocks", "digest")


@dataclass(frozen=True, slots=True)
class Node:
    """One block. `parent` is the number of another, -1 for none; `checksum` is empty without a payload."""

    parent: int
    num_tokens: int
    checksum: str


@dataclass(frozen=True, slots=True)
class Ref:
    """A state: the number of its last block, -1 for none, and the tokens after that."""

    tip: int
    rest: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ArchivedTag:
    """A checkpoint. `created_at` is in Unix seconds."""

    tag: str
    ref: Ref
    created_at: float


@dataclass(frozen=True, slots=True)
class ArchivedDocument:
    """A document by kind; `tag` names the checkpoint that it belongs to, if it does."""

    kind: str
    tag: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """What an agent's file says of itself. Of the `quota_nbytes`, 0 is none."""

    name: str
    model: str
    identity: Identity
    ref: Ref
    nodes: tuple[Node, ...]
    tags: tuple[ArchivedTag, ...]
    documents: tuple[ArchivedDocument, ...]
    quota_nbytes: int
    parent: str
    parent_tokens: int

    @property
    def num_tokens(self) -> int:
        """Tokens of all blocks."""
        return sum(node.num_tokens for node in self.nodes)

    @property
    def num_payloads(self) -> int:
        """Blocks that come with their KV."""
        return sum(node.checksum != "" for node in self.nodes)

    def sizes(self) -> tuple[int, int, int, int]:
        """Bytes of the tensors, in order."""
        return (
            self.num_tokens * TOKEN_NBYTES,
            sum(document.nbytes for document in self.documents),
            self.num_payloads * self.identity.cache.block_nbytes,
            DIGEST_NBYTES,
        )

    def header(self) -> bytes:
        """The bytes before the tensors."""
        block_nbytes = self.identity.cache.block_nbytes
        tokens, documents, blocks, digest = self.sizes()
        shapes = ([self.num_tokens], [documents], [self.num_payloads, block_nbytes], [digest])
        table: dict[str, Any] = {
            "__metadata__": {"format": KIND, "version": VERSION, "manifest": json.dumps(self._fields())}
        }
        end = 0
        for name, shape, nbytes in zip(_TENSORS, shapes, (tokens, documents, blocks, digest), strict=True):
            start, end = end, end + nbytes
            dtype = "U32" if name == "tokens" else "U8"
            table[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
        text = json.dumps(table).encode()
        length = -(-(LENGTH_NBYTES + len(text)) // _ALIGNMENT) * _ALIGNMENT - LENGTH_NBYTES
        return length.to_bytes(LENGTH_NBYTES, "little") + text.ljust(length)

    def _fields(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "model": self.model,
            "fingerprint": self.identity.fingerprint,
            "cache": self.identity.cache.fingerprint(),
            "tip": self.ref.tip,
            "rest": self.ref.rest,
            "nodes": [[node.parent, node.num_tokens, node.checksum] for node in self.nodes],
            "checkpoints": [[t.tag, t.ref.tip, t.ref.rest, t.created_at] for t in self.tags],
            "documents": [[d.kind, d.tag, d.nbytes] for d in self.documents],
            "quota_bytes": self.quota_nbytes,
            "parent": self.parent,
            "parent_tokens": self.parent_tokens,
        }


@dataclass(frozen=True, slots=True)
class Archive:
    """A file that was verified from its first to its last byte. `tokens` has those of each block, packed;
    `bodies` those of the documents; `payloads_at` is where the first payload starts."""

    manifest: Manifest
    tokens: tuple[bytes, ...]
    bodies: tuple[bytes, ...]
    payloads_at: int


def read_archive(
    file: BinaryIO, nbytes: int, max_documents_nbytes: int, expected: Identity | None = None
) -> Archive:
    """Verify an agent's file of `nbytes`. Raises ArchiveInvalid, ArchiveMismatch when it is not of the
    `expected` model and format, and OSError when it cannot be read."""
    digest = hashlib.blake2b(digest_size=DIGEST_NBYTES)
    file.seek(0)

    def take(count: int) -> bytes:
        data = file.read(count)
        if len(data) != count:
            _invalid("it ends too early")
        digest.update(data)
        return data

    if nbytes < LENGTH_NBYTES:
        _invalid(f"it has {nbytes} bytes")
    length = int.from_bytes(take(LENGTH_NBYTES), "little")
    if length > min(MAX_HEADER_NBYTES, nbytes):
        _invalid(f"its header would have {length} bytes")
    head = take(length)
    manifest = _manifest(head)
    if expected is not None:
        _refuse_other(manifest, expected)
    tokens_nbytes, documents_nbytes, blocks_nbytes, digest_nbytes = manifest.sizes()
    payloads_at = LENGTH_NBYTES + length + tokens_nbytes + documents_nbytes
    if payloads_at + blocks_nbytes + digest_nbytes != nbytes:
        _invalid(f"its parts do not add up to its {nbytes} bytes")
    if length.to_bytes(LENGTH_NBYTES, "little") + head != manifest.header():
        _invalid("its header is not in the one form that there is")
    if documents_nbytes > max_documents_nbytes:
        _invalid(f"it has {documents_nbytes} bytes of documents; {max_documents_nbytes} is the most")
    tokens = tuple([take(node.num_tokens * TOKEN_NBYTES) for node in manifest.nodes])
    bodies = tuple([take(document.nbytes) for document in manifest.documents])
    for body in bodies:
        _check_json(body)
    for node, packed in zip(manifest.nodes, tokens, strict=True):
        if node.checksum:
            payload = take(manifest.identity.cache.block_nbytes)
            if payload_checksum(payload, packed) != node.checksum:
                _invalid("the checksum of a block does not match")
    computed = digest.digest()
    if take(DIGEST_NBYTES) != computed:
        _invalid("its digest does not match")
    return Archive(manifest, tokens, bodies, payloads_at)


def _manifest(head: bytes) -> Manifest:
    """The manifest of a header. Raises ArchiveInvalid."""
    try:
        metadata = json.loads(head)["__metadata__"]
        kind, version = metadata["format"], metadata["version"]
        if (kind, version) != (KIND, VERSION):
            _invalid(f"it is {kind!r} of version {version!r}; this is read: {KIND!r} of version {VERSION!r}")
        fields = json.loads(metadata["manifest"])
        manifest = Manifest(
            name=_text(fields["name"]),
            model=_text(fields["model"]),
            identity=Identity(_text(fields["fingerprint"]), CacheSpec.parse(_text(fields["cache"]))),
            ref=_ref(fields["tip"], fields["rest"]),
            nodes=tuple(Node(_int(p, -1), _int(n, 1), _text(c)) for p, n, c in fields["nodes"]),
            tags=tuple(
                ArchivedTag(check_tag(_text(tag)), _ref(tip, rest), _time(at))
                for tag, tip, rest, at in fields["checkpoints"]
            ),
            documents=tuple(
                ArchivedDocument(_text(kind), _text(tag), _int(n)) for kind, tag, n in fields["documents"]
            ),
            quota_nbytes=_int(fields["quota_bytes"]),
            parent=_text(fields["parent"]),
            parent_tokens=_int(fields["parent_tokens"]),
        )
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError, InvalidRequest) as error:
        raise ArchiveInvalid(f"this is no agent's file that can be used: {error!r}") from error
    _check(manifest)
    return manifest


def _check(manifest: Manifest) -> None:
    """Numbers point backwards, only full blocks are gone on from, names occur once."""
    nodes, block_size = manifest.nodes, manifest.identity.cache.block_size
    for number, node in enumerate(nodes):
        if node.parent >= number or node.num_tokens > block_size:
            _invalid("its blocks are not a chain")
        if node.parent >= 0 and nodes[node.parent].num_tokens != block_size:
            _invalid("a block follows an unfinished one")
    if any(ref.tip >= len(nodes) for ref in (manifest.ref, *(tag.ref for tag in manifest.tags))):
        _invalid("it ends in a block that is not there")
    tags = [tag.tag for tag in manifest.tags]
    if len(tags) > MAX_CHECKPOINTS:
        _invalid(f"it has {len(tags)} checkpoints; {MAX_CHECKPOINTS} is the most")
    known = {("agent", ""), ("transcript", ""), *(("checkpoint", tag) for tag in tags)}
    documents = [(document.kind, document.tag) for document in manifest.documents]
    if len(set(tags)) < len(tags) or len(set(documents)) < len(documents) or not known >= set(documents):
        _invalid("its checkpoints or documents are named twice, or are of a kind that is not known")


def _refuse_other(manifest: Manifest, expected: Identity) -> None:
    found = manifest.identity
    if found.fingerprint != expected.fingerprint:
        raise ArchiveMismatch(
            f"the file is of model {manifest.model!r} with fingerprint {found.fingerprint[:12]}, the model "
            f"here has {expected.fingerprint[:12]}; serve that model and import again"
        )
    if found.cache != expected.cache:
        raise ArchiveMismatch(
            f"the file holds {found.cache.fingerprint()!r}, this server {expected.cache.fingerprint()!r}; "
            f"serve with --kv-format {found.cache.format} --block-size {found.cache.block_size}"
        )


def _check_json(body: bytes) -> None:
    try:
        from_json(body, allow_inf_nan=False)
    except ValueError:
        _invalid("one of its documents is not JSON")


def _ref(tip: object, rest: list[object]) -> Ref:
    return Ref(_int(tip, -1), tuple(_int(token, most=(1 << 32) - 1) for token in rest))


def _int(value: object, least: int = 0, most: int = 1 << 48) -> int:
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{value!r} is not a number from {least} to {most}")
    return value


def _time(value: object) -> float:
    if type(value) is not float or not 0 <= value < _MAX_TIME:
        raise ValueError(f"{value!r} is not a time in Unix seconds")
    return value


def _text(value: object) -> str:
    # Lone surrogates are not printable either; the catalog could not encode them.
    if not isinstance(value, str) or not value.isprintable():
        raise TypeError(f"{value!r} is not printable text")
    return value


def _invalid(what: str) -> NoReturn:
    raise ArchiveInvalid(f"the file cannot be imported: {what}; export the agent again")
