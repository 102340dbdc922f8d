"""Whatever the OpenAPI document allows, and much that it does not, is answered: no 500, and every error in
the envelope of its dialect."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase
from schemathesis import Case, GenerationMode
from schemathesis.core.result import Ok
from tests.api.conftest import Service, serving

from dormouse.api.errors import speaks_anthropic
from dormouse.runtimes.fake import FakeRuntime

EXAMPLES = 12
"""Of each kind for each operation; all of them take about half a minute."""
LIMITS = {"/v1/responses": "max_output_tokens"}
SHORT = 8
"""Of what is drawn, names up to so long are exchanged for ones that exist; the others are left to chance."""


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with serving(tmp_path_factory.mktemp("openapi"), FakeRuntime(256, context_length=512)) as service:
        yield service


@pytest.mark.timeout(240)
@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
def test_no_request_is_answered_with_a_500(service: Service, mode: GenerationMode) -> None:
    document = service.http.get("/openapi.json").json()
    operations = []
    for found in schemathesis.openapi.from_dict(document).get_all_operations():
        assert isinstance(found, Ok), found
        operations.append(found.ok())
    assert len(operations) > 30
    statuses: Counter[int] = Counter()
    with requests.Session() as session:
        for operation in operations:
            statuses += fuzz(operation, mode, service, session)
    assert service.chat().status_code == 200, "and the server serves on"
    if mode is GenerationMode.POSITIVE:
        assert statuses[200] > statuses.total() / 6, f"most got no further than the door: {statuses}"


def fuzz(operation: Any, mode: GenerationMode, service: Service, session: requests.Session) -> Counter[int]:
    """Call an operation with what may be drawn for it; how often it answered with which status."""
    statuses: Counter[int] = Counter()
    existing = make_things(service)

    @hypothesis.settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
    def check(case: Case[Any]) -> None:
        tame(case, existing if mode is GenerationMode.POSITIVE else {})
        answer = case.call(base_url=service.url, session=session, timeout=30)
        statuses[answer.status_code] += 1
        text = answer.content.decode(errors="replace")  # an agent's file is no text
        told = f"{case.method} {answer.request.url}\n{answer.request.body!r}\n{text}"
        assert answer.status_code < 500, told
        assert "internal error" not in text, told
        if answer.status_code >= 400:
            check_envelope(case.path, json.loads(text), told)

    try:
        check()
    except hypothesis.errors.Unsatisfiable:
        # An operation without parameters has no wrong ones.
        assert mode is GenerationMode.NEGATIVE
    return statuses


def make_things(service: Service) -> dict[str, str]:
    """Make an agent, a checkpoint and a response; their names by the names of parameters."""
    service.chat(prompt_cache_key="a").raise_for_status()
    service.http.post("/v1/agents/a/checkpoints", json={"tag": "t"})  # may be there
    body = {"model": "fake", "input": "hello", "max_output_tokens": 2}
    response = service.http.post("/v1/responses", json=body).raise_for_status().json()
    return {"name": "a", "tag": "t", "id": response["id"]}


def tame(case: Case[Any], existing: dict[str, str]) -> None:
    """Ask for few tokens; and with `existing` for things that there are, and no fields that nobody knows."""
    body = case.body
    if isinstance(body, dict) and "model" in body:
        limit = LIMITS.get(case.path, "max_tokens")
        given = body.get(limit)
        body[limit] = min(given, 4) if isinstance(given, int) else 4 if given is None else given
    if not existing:
        return
    for name, value in (case.path_parameters or {}).items():
        if name in existing and len(str(value)) <= SHORT:
            case.path_parameters[name] = existing[name] if case.path != "/v1/models/{name}" else "fake"
    if isinstance(body, dict) and "model" in body:
        body["model"] = "fake"
        bodies = case.operation.schema.raw_schema["components"]["schemas"].values()
        for name in set(body).difference(*(known.get("properties", ()) for known in bodies)):
            del body[name]


def check_envelope(path: str, body: Any, told: str) -> None:
    """An error as the dialect of `path` has it."""
    error = body["error"]
    assert isinstance(error["message"], str), told
    assert error["message"], told
    assert isinstance(error["type"], str), told
    if speaks_anthropic(path):
        assert body["type"] == "error", told
    else:
        assert {"param", "code"} <= error.keys(), told
