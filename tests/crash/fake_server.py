"""The real HTTP server as a process of its own, over the fake runtime: it replies fast, and otherwise when a
page is not what it was. Forked from a process that has imported all of it, so that it starts fast as well."""

from __future__ import annotations

import logging
import os
import time
from multiprocessing.connection import Connection
from pathlib import Path

from tests.api.conftest import TEMPLATE, byte_tokenizer

from dormouse.api.app import create_app
from dormouse.api.server import Server, bind
from dormouse.domain.plan import Plan
from dormouse.engine.engine import Engine
from dormouse.engine.options import EngineOptions
from dormouse.models.chat import ChatModel
from dormouse.models.chat_template import ChatTemplate
from dormouse.models.host import ModelHost
from dormouse.models.served import ServedModel
from dormouse.runtimes.base import Logits
from dormouse.runtimes.fake import EOS, FakeRuntime
from dormouse.store.block_store import BlockStore

NUM_PAGES = 512
"""Of 16 tokens: fewer than all agents together have, so that some sleep."""

STEP_S = 0.002
QUOTA_NBYTES = 64 << 20
GRACE_S = 1.0


class SteppingRuntime(FakeRuntime):
    """Takes about as long for a step as a small model does, so that kills hit replies."""

    def forward(self, plan: Plan) -> Logits:
        time.sleep(STEP_S)
        return super().forward(plan)


def main(folder: Path, durability: str, log: Path, urls: Connection) -> None:
    """Serve until SIGTERM; the URL is sent to `urls`, what is printed goes to `log`."""
    with log.open("ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    logging.basicConfig(level=logging.INFO, force=True)
    listener = bind("127.0.0.1", 0)
    chat = ChatModel(byte_tokenizer(), ChatTemplate({"default": TEMPLATE}, {}), frozenset({EOS}))
    store = BlockStore.open(folder, quota_nbytes=QUOTA_NBYTES)
    options = EngineOptions(sync=durability == "sync")
    engine = Engine(SteppingRuntime(NUM_PAGES), store, chat.decode_stream, chat.eos_token_ids, options)
    host = ModelHost(ServedModel("fake", 1_700_000_000, chat, engine, 60.0))
    app = create_app(host, store, max_body_nbytes=1 << 20)
    Server(app, host, grace_s=GRACE_S, on_ready=urls.send).run(sockets=[listener])
    store.close()
