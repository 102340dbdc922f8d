"""`dormouse serve`."""

from __future__ import annotations

import json
import time

import typer
from rich.text import Text

from dormouse.cli.logs import set_up_logging
from dormouse.cli.options import with_settings
from dormouse.cli.output import console, friendly_errors, human_nbytes, progress_bar
from dormouse.models.stack import Stack
from dormouse.settings import CLIENT_SETTINGS, Settings

_QUESTION = "What is the capital of France?"


@with_settings(*(name for name in Settings.model_fields if name not in CLIENT_SETTINGS))
def serve(settings: Settings) -> None:
    """Serve a model to many agents, until SIGTERM or Ctrl-C.

    Example: dormouse serve --model smollm2 --port 8000 --kv-format k8v4
    """
    set_up_logging(settings.log_level, settings.log_format)
    with friendly_errors():
        _run(settings)


def _run(settings: Settings) -> None:
    # The web stack is imported here, so that the other commands start at once.
    from dormouse.api.access import check_exposure
    from dormouse.api.app import create_app
    from dormouse.api.edge import Edge
    from dormouse.api.keys import KeyRing
    from dormouse.api.rate_limits import RateLimits
    from dormouse.api.server import Server, bind
    from dormouse.api.tracing import open_tracer

    started = time.monotonic()
    # First of all: a port in use is known before a model is loaded for nothing.
    listener = bind(settings.host, settings.port)
    with listener, open_tracer(settings.otlp_endpoint) as tracer:
        keys = KeyRing(settings.data_dir)
        check_exposure(listener, keys, insecure=settings.insecure)
        limits = RateLimits(
            settings.requests_per_minute, settings.tokens_per_minute, settings.agent_requests_per_minute
        )
        around = Edge(
            keys=keys,
            limits=limits,
            cors_origins=settings.cors_origins,
            allowed_hosts=(settings.host, *settings.allowed_hosts),
            observers=(tracer.record,) if tracer else (),
        )
        stack = Stack.prepare(settings)

        async def load() -> None:
            with progress_bar() as on_progress:
                await stack.host.start(settings.model, on_progress)

        try:
            server = Server(
                create_app(stack.host, stack.store, max_body_nbytes=settings.max_body_nbytes, around=around),
                stack.host,
                grace_s=settings.grace_s,
                on_ready=lambda url: _announce(settings, stack, url, time.monotonic() - started),
                load=load,
            )
            server.run(sockets=[listener])
        finally:
            stack.close()
            console.print("Stopped; everything is saved." if not stack.store.health() else "Stopped.")
    if not server.started:
        raise typer.Exit(1)


def _announce(settings: Settings, stack: Stack, url: str, seconds: float) -> None:
    """What is served, and a line to try it with."""
    runtime, served = stack.runtime, stack.served
    cache = runtime.cache
    nbytes = human_nbytes(runtime.num_pages * cache.block_nbytes)
    for label, value in (
        ("model", f"{served.name} ({runtime.spec.architecture}, context {served.engine.max_length} tokens)"),
        ("runtime", runtime.name),
        ("KV format", f"{cache.format}, blocks of {cache.block_size} tokens"),
        ("arena", f"{runtime.num_pages * cache.block_size} tokens ({nbytes})"),
        ("data", f"{settings.data_dir}{', encrypted' if stack.store.is_encrypted else ''}"),
        ("ready", f"{url} after {seconds:.1f} s"),
    ):
        console.print(Text.assemble((f"{label:>10}", "bold"), f"  {value}"), soft_wrap=True)
    messages = [{"role": "user", "content": _QUESTION}]
    body = {"model": served.name, "messages": messages, "temperature": 0, "max_tokens": 32}
    console.print(
        f"\ncurl {url}/v1/chat/completions -H 'content-type: application/json' -H 'x-agent-id: me' "
        f"-d '{json.dumps(body)}'\n",
        highlight=False,
        soft_wrap=True,
        markup=False,
    )
