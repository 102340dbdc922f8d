"""A prompt longer than what the real model was trained for: the mechanics, whatever the words."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.engine.harness import GREEDY, Client

from dormouse.bench.client import random_prompt
from dormouse.models.folder import ModelFolder
from dormouse.models.stack import Stack
from dormouse.settings import Settings

LENGTH, PROMPT = 32_768, 10_000


@pytest.mark.timeout(600)
def test_a_prompt_beyond_the_trained_context_is_served_and_wakes(
    tmp_path: Path, smollm2: ModelFolder
) -> None:
    assert smollm2.path
    settings = Settings(data_dir=tmp_path, context_length=LENGTH, rope_scaling="yarn")
    prompt = random_prompt(0, PROMPT, 49_152)

    def ask() -> tuple[str, int]:
        with Stack.open(settings) as stack:
            assert stack.served.engine.max_length == LENGTH
            call = Client(stack.served.engine).submit(prompt, GREEDY, agent="a", deadline_s=500)
            call.wait_s = 500
            usage = call.finished().usage
            return call.text, usage.disk_tokens

    cold, from_disk = ask()
    assert from_disk == 0
    again, from_disk = ask()
    assert again == cold
    assert from_disk == PROMPT - 1, "nothing but the last token is computed again"
