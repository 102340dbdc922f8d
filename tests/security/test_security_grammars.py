"""Schemas and patterns from clients that are made to be expensive: refused with the reason, or cheap."""

from __future__ import annotations

import resource
from typing import Any

import pytest
from hypothesis import given
from tests.models.test_grammars import ASK, Model
from tests.models.toy_gguf import toy_llama
from tests.security.mutations import fuzzing, twisted

from dormouse.domain.conversation import Conversation, OutputFormat, Tool
from dormouse.domain.errors import InvalidRequest
from dormouse.models.folder import ModelFolder
from dormouse.models.gguf_import import import_gguf
from dormouse.models.tool_formats.hermes import Hermes

MOST_MEMORY_KB = 1 << 20
TEXT = {"type": "string"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    place = tmp_path_factory.mktemp("grammars")
    toy_llama(place / "toy.gguf")
    folder: ModelFolder = import_gguf(place / "toy.gguf", place / "toy")
    return Model(folder, Hermes())


def _wide(count: int) -> dict[str, Any]:
    return {"type": "object", "properties": {f"p{n}": TEXT for n in range(count)}}


def _doubled(levels: int) -> dict[str, Any]:
    """Each definition names the next one twice: 2 ** levels places."""
    definitions: dict[str, Any] = {
        f"d{n}": {"type": "array", "prefixItems": [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(levels)
    }
    return {"$ref": "#/$defs/d0", "$defs": definitions | {f"d{levels}": TEXT}}


HOSTILE: dict[str, dict[str, Any]] = {
    "reference to itself": {"$ref": "#"},
    "references in a circle": {
        "$ref": "#/$defs/a",
        "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}},
    },
    "recursive objects": {"type": "object", "properties": {"a": {"$ref": "#"}, "b": {"$ref": "#"}}},
    "doubling references": _doubled(40),
    "reference to nothing": {"$ref": "#/$defs/nobody"},
    "reference to a file": {"$ref": "file:///etc/passwd"},
    "reference to the network": {"$ref": "http://127.0.0.1:9/schema.json"},
    "a million names": {"enum": [f"{n}" for n in range(1_000_000)]},
    "many names": {"enum": [f"name{n}" for n in range(15_000)]},
    "many properties": _wide(4000),
    "huge counts": {"type": "array", "items": TEXT, "minItems": 10**9, "maxItems": 10**9},
    "huge lengths": {"type": "string", "minLength": 10**9, "maxLength": 10**12},
    "huge numbers": {"type": "integer", "minimum": -(10**300), "maximum": 10**300},
    "many alternatives": {"anyOf": [{"type": "string", "pattern": f"^{n}.*{n}$"} for n in range(2000)]},
    "alternatives of alternatives": {"allOf": [{"anyOf": [TEXT, {"type": "integer"}]}] * 24},
    "nested quantifiers": {"type": "string", "pattern": "^((((a{1,99}){1,99}){1,99}){1,99}){1,99}$"},
    "catastrophic backtracking": {"type": "string", "pattern": "^(a+)+(a|aa)+(a|a?)+$"},
    "counted dots": {"type": "string", "pattern": "^(.*a.{1000}){10}$"},
    "look-around": {"type": "string", "pattern": "^(?=.*a)(?!.*b).*$"},
    "back-reference": {"type": "string", "pattern": "^(a)\\1$"},
    "unicode classes": {"type": "string", "pattern": "^(\\p{L}{1,500}\\p{N}{1,500}){1,50}$"},
    "many patterns": {"type": "object", "patternProperties": {f"^a{n}.*$": TEXT for n in range(500)}},
    "an option of the compiler": {
        "x-guidance": {"lenient": False, "whitespace_pattern": "(a+)+"},
        "type": "object",
    },
    "a broken option": {"x-guidance": {"unknown": [[[]]]}, "type": "object"},
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("is_tool", [False, True], ids=["format", "tool"])
@pytest.mark.parametrize("name", HOSTILE)
def test_a_schema_is_refused_or_cheap(model: Model, name: str, is_tool: bool) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    schema = HOSTILE[name]
    tools = (Tool("f", "", {"type": "object", "properties": {"a": schema}}, strict=True),) if is_tool else ()
    asked = Conversation(ASK, tools, format=None if is_tool else OutputFormat(schema))
    constraint = None
    try:
        constraint = model.grammars().constraint(asked, "", "tenant")
    except InvalidRequest as refusal:
        told = str(refusal)
    else:
        told = ""
    finally:
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST_MEMORY_KB
    assert len(told) < 2000, "and the schema is not quoted at length"
    for token in (
        ()
        if told
        else model.encode('<tool_call>{"name": "f"' if is_tool else '"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa')
    ):
        assert constraint is not None
        model.allowed(constraint)
        if not constraint.took(token):
            break


SCHEMA = {
    "type": "object",
    "properties": {
        "a": {"type": "string", "pattern": "^x+$", "minLength": 1},
        "b": {"type": "array", "items": {"enum": [1, "x", None]}, "maxItems": 3},
        "c": {"anyOf": [{"$ref": "#/$defs/d"}, {"type": "number", "minimum": 0}]},
    },
    "required": ["a"],
    "additionalProperties": False,
    "$defs": {"d": {"type": "object"}},
}


@pytest.mark.timeout(300)
def test_fuzz_schemas(model: Model) -> None:
    grammars = model.grammars()

    @fuzzing(80)
    @given(schema=twisted(SCHEMA))
    def check(schema: Any) -> None:
        if not isinstance(schema, dict):
            return
        for asked in (
            Conversation(ASK, format=OutputFormat(schema)),
            Conversation(ASK, format=OutputFormat(schema, strict=False)),
            Conversation(ASK, (Tool("f", "", schema, strict=True),)),
        ):
            try:
                constraint = grammars.constraint(asked, "", "tenant")
            except InvalidRequest:
                continue
            assert constraint is not None
            model.allowed(constraint)

    check()
