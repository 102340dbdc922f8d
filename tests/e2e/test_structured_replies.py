"""The real model kept to tools and schemas, beside a neighbour that is free."""

from __future__ import annotations

import json
import queue
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jsonschema
import pytest

from dormouse.domain.conversation import (
    Called,
    Conversation,
    Message,
    OutputFormat,
    Piece,
    Role,
    Said,
    Tool,
    ToolChoice,
    ToolMode,
)
from dormouse.domain.requests import (
    Event,
    Finished,
    FinishReason,
    Request,
    SamplingParams,
    Started,
    TextDelta,
)
from dormouse.models.folder import ModelFolder
from dormouse.models.served import ServedModel
from dormouse.models.stack import Stack
from dormouse.settings import Settings

WAIT_S = 60.0
GREEDY = SamplingParams(temperature=0, max_tokens=160)
SAMPLED = SamplingParams(temperature=1.2, seed=11, max_tokens=400, frequency_penalty=0.5)
WEATHER = Tool(
    "get_weather",
    "The weather of a city.",
    {
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 40},
            "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
        },
        "required": ["city", "unit"],
        "additionalProperties": False,
    },
    strict=True,
)
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 30},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 12}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
ASK_WEATHER = (Message(Role.USER, "What is the weather in Paris?"),)
ASK_PERSON = (Message(Role.USER, "Invent a person."),)
BRIEF = SamplingParams(temperature=0, max_tokens=48)
FREE = Conversation((Message(Role.USER, "Tell me about the sea."),))


@dataclass
class Reply:
    """What came of one conversation."""

    pieces: list[Piece]
    end: Event
    tokens: tuple[int, ...]

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces if isinstance(piece, Said))


class Pending:
    """A conversation on its way, as the API sends it."""

    def __init__(self, served: ServedModel, conversation: Conversation, sampling: SamplingParams) -> None:
        chat = served.chat
        prompt = chat.render_conversation(conversation)
        self._parser = chat.reply_parser(conversation, prompt)
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        request = Request(
            uuid.uuid4().hex,
            tuple(chat.encode(prompt, add_special_tokens=False)),
            sampling,
            self._events.put,
            constraint=chat.constraint(conversation, prompt, "default"),
        )
        served.engine.submit(request)

    def result(self) -> Reply:
        pieces: list[Piece] = []
        while isinstance(event := self._events.get(timeout=WAIT_S), TextDelta | Started):
            pieces += self._parser.push(event.text) if isinstance(event, TextDelta) else []
        assert isinstance(event, Finished), event
        return Reply(pieces + self._parser.finish(), event, event.tokens)


@pytest.fixture(scope="module")
def served(smollm2: ModelFolder, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedModel]:
    folder = tmp_path_factory.mktemp("structured")
    settings = Settings(model=str(smollm2.path), data_dir=folder, arena_tokens=16384)
    with Stack.open(settings) as stack:
        yield stack.served


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_required_choice_gives_a_valid_call(served: ServedModel, sampling: SamplingParams) -> None:
    asked = Conversation(ASK_WEATHER, (WEATHER,), ToolChoice(ToolMode.REQUIRED, parallel=False))
    reply = Pending(served, asked, sampling).result()
    assert isinstance(reply.end, Finished)
    assert reply.end.reason is FinishReason.STOP
    (called,) = reply.pieces
    assert isinstance(called, Called)
    assert called.call.name == WEATHER.name
    jsonschema.validate(json.loads(called.call.arguments), WEATHER.parameters)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_answers_validate_and_free_neighbours_say_the_same(
    served: ServedModel, sampling: SamplingParams
) -> None:
    alone = Pending(served, FREE, BRIEF).result()
    asked = Conversation(ASK_PERSON, format=OutputFormat(PERSON))
    neighbour = Pending(served, FREE, BRIEF)
    replies = [Pending(served, asked, sampling) for _ in range(3)]
    assert neighbour.result().tokens == alone.tokens
    for pending in replies:
        reply = pending.result()
        jsonschema.validate(json.loads(reply.text), PERSON)
        assert reply.end.reason is FinishReason.STOP if isinstance(reply.end, Finished) else False


def test_a_result_leads_to_words(served: ServedModel) -> None:
    asked = Conversation(ASK_WEATHER, (WEATHER,), ToolChoice(ToolMode.REQUIRED, parallel=False))
    (called,) = Pending(served, asked, GREEDY).result().pieces
    assert isinstance(called, Called)
    result = Message(Role.TOOL, "Sunny, 24 degrees.", call_id=called.call.id, name=called.call.name)
    later = Conversation(
        (*ASK_WEATHER, Message(Role.ASSISTANT, calls=(called.call,)), result),
        (WEATHER,),
        ToolChoice(ToolMode.NONE),
    )
    assert "24" in Pending(served, later, GREEDY).result().text


def test_speculation_changes_no_constrained_word(
    smollm2: ModelFolder, tmp_path: Path, served: ServedModel
) -> None:
    asked = Conversation(ASK_PERSON, format=OutputFormat(PERSON))
    guessed = Pending(served, asked, SAMPLED).result()
    assert served.engine.stats().accepted_tokens > 0
    settings = Settings(model=str(smollm2.path), data_dir=tmp_path, arena_tokens=16384, speculation="off")
    with Stack.open(settings) as stack:
        assert Pending(stack.served, asked, SAMPLED).result().tokens == guessed.tokens
        assert stack.served.engine.stats().drafted_tokens == 0
