"""`dormouse chat`: talk with an agent on a terminal."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any
from urllib.parse import quote

import httpx
import typer

from dormouse.cli.options import key_header, with_settings
from dormouse.cli.output import console, errors, fail, friendly_errors
from dormouse.domain.agents import check_agent_name
from dormouse.settings import Settings

_CONNECT_TIMEOUT_S = 5.0


class ChatFailed(Exception):
    """The server refused or broke off; the message is its own."""


@with_settings("host", "port", "api_key")
def chat(
    settings: Settings,
    agent: Annotated[str, typer.Argument(help="Name of the agent.")] = "me",
    fresh: Annotated[bool, typer.Option("--new", help="Forget what was said before.")] = False,
    temperature: Annotated[float, typer.Option(help="0 is greedy.", min=0, max=2)] = 0.2,
    max_tokens: Annotated[int, typer.Option(help="Longest reply, in tokens.", min=1)] = 512,
) -> None:
    """Chat with an agent of a running server, which keeps the conversation; end it with Ctrl-D.

    Example: dormouse chat me
    """
    with friendly_errors():
        path = f"/v1/agents/{quote(check_agent_name(agent), safe='')}"
    base_url = f"http://{settings.host}:{settings.port}"
    timeout = httpx.Timeout(settings.request_timeout_s, connect=_CONNECT_TIMEOUT_S)
    with httpx.Client(base_url=base_url, headers=key_header(settings), timeout=timeout) as client:
        try:
            _greet(_open(client, path, agent, fresh=fresh))
            while (said := _read()) is not None:
                turn = {
                    "messages": [{"role": "user", "content": said}],
                    "temperature": temperature,
                    "max_tokens": max_tokens,
                    "stream": True,
                }
                _show(_stream(client, f"{path}/messages", turn))
        except httpx.ConnectError as error:
            hint = "start one with `dormouse serve`, or give its --host and --port"
            raise fail(f"no server answers at {base_url} ({error}); {hint}") from error
        except httpx.TransportError as error:
            console.print()
            raise fail(f"the connection broke off ({error}); say it again once the server is back") from error
        except ChatFailed as error:
            raise fail(error) from error


def _open(client: httpx.Client, path: str, agent: str, *, fresh: bool) -> list[dict[str, Any]]:
    """What was said so far; of an agent that is new, nothing."""
    if fresh and client.delete(path).status_code not in (200, 404):
        raise ChatFailed(f"agent '{agent}' could not be forgotten")
    found = client.get(f"{path}/messages")
    if found.status_code == 404:
        _checked(client.post("/v1/agents", json={"name": agent}))
        return []
    messages: list[dict[str, Any]] = _checked(found)["data"]
    return messages


def _checked(answer: httpx.Response) -> dict[str, Any]:
    """The body of an answer. Raises ChatFailed for an error, and for who speaks another language."""
    try:
        body: dict[str, Any] = answer.json()
        if answer.is_error:
            raise ChatFailed(body["error"]["message"])
    except (ValueError, LookupError, TypeError) as error:
        raise ChatFailed(f"what answers at {answer.url.host} is no Dormouse server") from error
    return body


def _greet(messages: list[dict[str, Any]]) -> None:
    errors.print("Ctrl-D ends the chat, Ctrl-C a reply.", style="dim")
    for message in messages:
        mark = "[bold cyan]>[/] " if message["role"] == "user" else ""
        console.print(mark, end="")
        console.print(message["content"], markup=False, highlight=False)


def _read() -> str | None:
    """The next thing to say; None at the end of the input."""
    try:
        while not (said := console.input("[bold cyan]>[/] ").strip()):
            continue
    except (EOFError, KeyboardInterrupt):
        console.print()
        return None
    return said


def _show(pieces: Iterator[str]) -> None:
    """Print a reply as it comes; Ctrl-C ends it: then the server stops writing, and forgets the turn."""
    try:
        for piece in pieces:
            console.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
    except KeyboardInterrupt:
        console.print(" … (forgotten)", end="", style="dim", highlight=False)
    console.print()


def _stream(client: httpx.Client, path: str, turn: dict[str, Any]) -> Iterator[str]:
    with client.stream("POST", path, json=turn) as answer:
        if answer.is_error:
            answer.read()
            _checked(answer)
        for line in answer.iter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                raise ChatFailed(chunk["error"]["message"])
            yield chunk["choices"][0]["delta"].get("content") or ""
