"""Anthropic's SDK of the 0.x line, which speaks the older version of the API; the server is at argv[1]."""

from __future__ import annotations

import sys
from typing import Any

import anthropic

TOOL: Any = {
    "name": "weather",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}

assert anthropic.__version__.startswith("0."), anthropic.__version__
asked: Any = {
    "model": "smollm2",
    "max_tokens": 16,
    "tools": [TOOL],
    "messages": [{"role": "user", "content": "What is the weather like in Bergen?"}],
}
client = anthropic.Anthropic(base_url=sys.argv[1], api_key="none", max_retries=0)
with client.messages.stream(**asked) as stream:
    text = "".join(stream.text_stream)
    message = stream.get_final_message()
assert text == "".join(block.text for block in message.content if block.type == "text")
assert message.usage.output_tokens > 0
call: Any = {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Bergen"}}
result: Any = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "Rain."}
asked["messages"] += [{"role": "assistant", "content": [call]}, {"role": "user", "content": [result]}]
reply = client.messages.create(**asked)
assert reply.stop_reason in ("end_turn", "max_tokens")
del asked["max_tokens"]
used = reply.usage
known = (used.cache_read_input_tokens or 0) + (used.cache_creation_input_tokens or 0)
assert client.messages.count_tokens(**asked).input_tokens == used.input_tokens + known
