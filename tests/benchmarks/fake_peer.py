"""A server that looks like any OpenAI-compatible one, as a process; started by the tests of the harness.

`python fake_peer.py PORT STORE` repeats the last character of the prompt. It keeps what it was told in STORE.
"""

from __future__ import annotations

import json
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

STEP_S = 0.01


class Handler(BaseHTTPRequestHandler):
    """`/health`, `/v1/completions` and the two calls on a slot."""

    def do_GET(self) -> None:
        self._answer({"engine": {"pages_used": 0}, "memory": {"weights_nbytes": 1 << 20}})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.path != "/v1/completions":
            self._answer({"n_written": 1000})
        elif "refuse" in body["prompt"]:
            self._answer({"error": "no"}, 400)
        else:
            self._complete(body)

    def _complete(self, body: dict[str, Any]) -> None:
        Path(sys.argv[2]).mkdir(exist_ok=True)
        (Path(sys.argv[2]) / (self.headers["x-agent-id"] or "nobody")).write_text(body["prompt"])
        self.send_response(200)
        self.end_headers()
        for _ in range(body["max_tokens"]):
            time.sleep(STEP_S)
            self._event({"choices": [{"text": body["prompt"][-1]}]})
        usage = {"prompt_tokens": 7, "completion_tokens": body["max_tokens"]}
        self._event({"choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, payload: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(payload)}\n\n".encode())
        self.wfile.flush()

    def _answer(self, payload: dict[str, Any], status: int = 200) -> None:
        body = json.dumps(payload).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
