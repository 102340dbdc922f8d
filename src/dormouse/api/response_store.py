"""Stored responses: documents of the store, each with what it answered and whom it follows."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from dormouse.domain.errors import ResponseNotFound
from dormouse.store.block_store import BlockStore

_KIND = "response"
_LONGEST_CHAIN = 10_000
"""Responses that follow each other; more can only be a circle."""


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """A response and the input items that it answered."""

    response: dict[str, Any]
    input: list[dict[str, Any]]


class ResponseStore:
    """The responses of all tenants. Its methods wait for the store: for worker threads."""

    def __init__(self, store: BlockStore) -> None:
        self._store = store

    def put(self, tenant: str, stored: StoredResponse) -> None:
        """Keep a response; the longest unused ones go first where there are too many."""
        body = json.dumps({"response": stored.response, "input": stored.input}).encode()
        self._store.notebook.put(tenant, _KIND, stored.response["id"], body)

    def get(self, tenant: str, id: str) -> StoredResponse:
        """The response of that id. Raises ResponseNotFound."""
        body = self._store.notebook.get(tenant, _KIND, id)
        if body is None:
            raise ResponseNotFound(
                f"response '{id}' is not stored here; send the whole conversation as input instead",
                param="previous_response_id",
            )
        document = json.loads(body)
        return StoredResponse(document["response"], document["input"])

    def delete(self, tenant: str, id: str) -> None:
        """Forget a response. Raises ResponseNotFound."""
        self.get(tenant, id)
        self._store.notebook.delete(tenant, _KIND, id)

    def past(self, tenant: str, id: str | None) -> list[dict[str, Any]]:
        """All items up to and with the response `id`, the oldest first. Raises ResponseNotFound."""
        turns: list[list[dict[str, Any]]] = []
        previous = id
        while previous is not None and len(turns) < _LONGEST_CHAIN:
            stored = self.get(tenant, previous)
            turns.append([*stored.input, *stored.response["output"]])
            previous = stored.response["previous_response_id"]
        return [item for turn in reversed(turns) for item in turn]
