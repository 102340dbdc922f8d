"""`dormouse chat`: talk with an agent on a terminal."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any

import httpx
import typer

from dormouse.cli.options import key_header, with_settings
from dormouse.cli.output import console, errors, fail, friendly_errors
from dormouse.cli.transcript import Transcript
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
    """Chat with an agent of a running server. It remembers the conversation; end it with Ctrl-D.

    Example: dormouse chat me
    """
    with friendly_errors():
        transcript = Transcript.open(check_agent_name(agent), fresh=fresh)
    base_url = f"http://{settings.host}:{settings.port}"
    timeout = httpx.Timeout(settings.request_timeout_s, connect=_CONNECT_TIMEOUT_S)
    with httpx.Client(base_url=base_url, headers=key_header(settings), timeout=timeout) as client:
        try:
            body = {
                "model": _model(client),
                "prompt_cache_key": agent,
                "temperature": temperature,
                "max_tokens": max_tokens,
            }
            _greet(transcript)
            while (said := _read()) is not None:
                question = {"role": "user", "content": said}
                messages = [*transcript.messages, question]
                reply = _show(_stream(client, {**body, "messages": messages}))
                # Both or neither: a question that was refused would spoil every later one.
                transcript.add(question, {"role": "assistant", "content": reply})
        except httpx.ConnectError as error:
            hint = "start one with `dormouse serve`, or give its --host and --port"
            raise fail(f"no server answers at {base_url} ({error}); {hint}") from error
        except httpx.TransportError as error:
            console.print()
            raise fail(f"the connection broke off ({error}); say it again once the server is back") from error
        except ChatFailed as error:
            raise fail(error) from error


def _greet(transcript: Transcript) -> None:
    errors.print("Ctrl-D ends the chat, Ctrl-C a reply.", style="dim")
    for message in transcript.messages:
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


def _show(pieces: Iterator[str]) -> str:
    """Print a reply as it comes; Ctrl-C ends it, and the server stops writing it."""
    reply = ""
    try:
        for piece in pieces:
            reply += piece
            console.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
    except KeyboardInterrupt:
        console.print(" …", end="")
    console.print()
    return reply


def _stream(client: httpx.Client, body: dict[str, Any]) -> Iterator[str]:
    with client.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as answer:
        if answer.is_error:
            answer.read()
            raise ChatFailed(answer.json()["error"]["message"])
        for line in answer.iter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                raise ChatFailed(chunk["error"]["message"])
            yield chunk["choices"][0]["delta"].get("content", "")


def _model(client: httpx.Client) -> str:
    """The model that the server serves."""
    try:
        answer = client.get("/v1/models")
        if answer.is_error:
            raise ChatFailed(answer.json()["error"]["message"])
        name: str = answer.json()["data"][0]["id"]
    except (ValueError, LookupError, TypeError) as error:
        raise ChatFailed(f"what answers at {client.base_url} is no Dormouse server") from error
    return name
