"""Which model and format a namespace stands for: a namespace is a hash, and a hash names nothing."""

from __future__ import annotations

import json
from dataclasses import dataclass

from dormouse.domain.blocks import Namespace, namespace_of
from dormouse.domain.cache_spec import CacheSpec
from dormouse.store.rows import DocumentId

IDENTITY_KIND = "namespace"


@dataclass(frozen=True, slots=True)
class Identity:
    """The model, by its fingerprint, and the format of its blocks."""

    fingerprint: str
    cache: CacheSpec

    def namespace(self, tenant: str) -> Namespace:
        """Under which a tenant's keys of this model and format are valid."""
        return namespace_of(self.fingerprint, self.cache.fingerprint(), tenant)

    def to_json(self) -> bytes:
        """The document that is kept of it."""
        return json.dumps({"fingerprint": self.fingerprint, "cache": self.cache.fingerprint()}).encode()

    @classmethod
    def from_json(cls, body: bytes) -> Identity:
        """The inverse of `to_json`. Raises ValueError."""
        fields = json.loads(body)
        return cls(fields["fingerprint"], CacheSpec.parse(fields["cache"]))


def identity_document(namespace: Namespace) -> DocumentId:
    """Where the identity of a namespace is kept; it belongs to no tenant."""
    return DocumentId("", IDENTITY_KIND, namespace.hex())
