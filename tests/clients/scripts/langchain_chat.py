"""LangChain's ChatOpenAI against the server at argv[1]."""

from __future__ import annotations

import sys

from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI


def weather(city: str) -> str:
    """The weather in a city."""
    return f"Rain in {city}."


model = ChatOpenAI(
    model="smollm2", base_url=f"{sys.argv[1]}/v1", api_key="none", temperature=0, max_tokens=16, max_retries=0
)
question = HumanMessage("What is the weather like in Bergen?")
whole = model.invoke([question])
assert whole.content
assert whole.usage_metadata
assert whole.usage_metadata["output_tokens"] > 0
assert "".join(str(chunk.content) for chunk in model.stream([question])) == whole.content

call = AIMessage("", tool_calls=[{"name": "weather", "args": {"city": "Bergen"}, "id": "call_1"}])
result = ToolMessage(weather("Bergen"), tool_call_id="call_1")
assert model.bind_tools([weather]).invoke([question, call, result]).content

responses = ChatOpenAI(
    model="smollm2", base_url=f"{sys.argv[1]}/v1", api_key="none", max_tokens=16, use_responses_api=True
)
assert responses.invoke([question]).text
