"""What was said in `dormouse chat`, kept as text so that the next chat goes on there.

The server keeps tokens and KV, and a client of its stateless API sends the whole conversation each time.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import platformdirs

from dormouse.domain.errors import InvalidRequest


class Transcript:
    """The messages of one agent, in a file that only its owner can read."""

    def __init__(self, path: Path, messages: list[dict[str, str]]) -> None:
        self._path = path
        self._messages = messages

    @classmethod
    def open(cls, agent: str, *, fresh: bool) -> Transcript:
        """The transcript of `agent`, empty if there is none or `fresh` is set.

        Raises InvalidRequest when its file is damaged.
        """
        # Names may hold anything, so they never become paths.
        digest = hashlib.blake2b(agent.encode(), digest_size=16).hexdigest()
        path = platformdirs.user_state_path("dormouse") / "chats" / f"{digest}.json"
        if fresh or not path.exists():
            return cls(path, [])
        try:
            return cls(path, json.loads(path.read_text(encoding="utf-8")))
        except ValueError as error:
            raise InvalidRequest(f"{path} is damaged ({error}); start anew with --new") from error

    @property
    def messages(self) -> list[dict[str, str]]:
        """All messages, as the chat API takes them."""
        return list(self._messages)

    def add(self, *messages: dict[str, str]) -> None:
        """Append messages and save."""
        self._messages += messages
        self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        fresh = self._path.with_suffix(".new")
        with os.fdopen(
            os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8"
        ) as file:
            json.dump(self._messages, file, ensure_ascii=False)
        fresh.replace(self._path)
