"""Clients that do not read, do not send, or do so byte by byte: they cost themselves, nobody else."""

from __future__ import annotations

import json
import logging
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from tests.faults.conftest import Serve
from tests.faults.faulty import WAIT_S, Gate, Site, text_of

from dormouse.api import limits
from dormouse.api.connection import Connection

NO_TIME_S = 0.2


@contextmanager
def connected(site: Site, *, receive_nbytes: int | None = None) -> Iterator[socket.socket]:
    """A bare connection to the server."""
    host, port = site.url.removeprefix("http://").split(":")
    with socket.socket() as client:
        if receive_nbytes is not None:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_nbytes)
        client.settimeout(WAIT_S)
        client.connect((host, int(port)))
        yield client


def request_of(path: str = "/v1/chat/completions", **fields: object) -> tuple[bytes, bytes]:
    """Headers and body of a chat completion."""
    message = {"role": "user", "content": "hello"}
    body = json.dumps({"model": "fake", "messages": [message], "temperature": 0, "max_tokens": 8} | fields)
    kind = f"content-type: application/json\r\ncontent-length: {len(body)}"
    return f"POST {path} HTTP/1.1\r\nhost: localhost\r\n{kind}\r\n\r\n".encode(), body.encode()


def read_all(client: socket.socket) -> bytes:
    """What comes until the server closes; it must."""
    received = b""
    try:
        while part := client.recv(65536):
            received += part
    except ConnectionResetError:
        pass
    return received


def answer_on(client: socket.socket) -> bytes:
    """One whole answer, on a connection that stays."""
    received = b""
    while b"\r\n\r\n" not in received or len(received.partition(b"\r\n\r\n")[2]) < length_of(received):
        part = client.recv(65536)
        assert part, "the server closed before the end"
        received += part
    return received


def length_of(answer: bytes) -> int:
    """What its header says of its body."""
    head = answer.partition(b"\r\n\r\n")[0].decode().lower()
    return int(head.partition("content-length: ")[2].split("\r\n")[0])


def trickle(client: socket.socket, data: bytes) -> threading.Event:
    """Send byte by byte in the background, until the server or the event ends it."""
    stop = threading.Event()

    def send() -> None:
        for index in range(len(data)):
            try:
                client.sendall(data[index : index + 1])
            except OSError:
                return
            if stop.wait(NO_TIME_S / 4):
                return

    threading.Thread(target=send, daemon=True).start()
    return stop


def test_a_client_that_never_reads_is_cut(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    site = serve(num_pages=256, buffer_nbytes=4096)
    head, body = request_of(max_tokens=3000, stream=True, logprobs=True, top_logprobs=20)
    with monkeypatch.context() as patch, connected(site, receive_nbytes=4096) as client:
        patch.setattr(Connection, "stall_s", NO_TIME_S)
        client.sendall(head + body)
        site.until(lambda: site.logged(logging.INFO, "read nothing"))
        assert len(read_all(client)) < 1 << 20
    site.until(lambda: site.engine.num_open == 0)
    assert site.chat().status_code == 200
    assert (site.status(), site.reasons()) == ("ok", set())
    ended = site.metric("dormouse_replies_total", outcome="aborted") + site.metric(
        "dormouse_replies_total", outcome="length"
    )
    assert ended == 2


def test_a_slow_reader_that_reads_on_gets_all(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Connection, "stall_s", WAIT_S)
    site = serve(num_pages=256, buffer_nbytes=4096)
    head, body = request_of(max_tokens=500, stream=True, logprobs=True, top_logprobs=20)
    with connected(site, receive_nbytes=4096) as client:
        client.sendall(head.replace(b"host: localhost", b"host: localhost\r\nconnection: close") + body)
        site.until(lambda: site.engine.num_open == 0)  # it was generated long before it was read
        assert b"data: [DONE]" in read_all(client)
    assert not site.logged(logging.INFO, "read nothing")


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
def test_a_body_byte_by_byte_is_refused(site: Site, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    head, body = request_of(path)
    with monkeypatch.context() as patch, connected(site) as client:
        patch.setattr(limits, "BODY_S", NO_TIME_S)
        client.sendall(head)
        stop = trickle(client, body)
        answer = read_all(client)
        stop.set()
    assert b" 408 " in answer.split(b"\r\n")[0]
    error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
    assert "send it again" in error["message"]
    assert site.chat().status_code == 200
    assert site.metric("dormouse_requests_total", status="408") == 1
    assert site.status() == "ok"


def test_headers_byte_by_byte_are_not_waited_for(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    head, _ = request_of()
    with monkeypatch.context() as patch:
        patch.setattr(Connection, "headers_s", NO_TIME_S)
        with connected(site) as client:
            stop = trickle(client, head)
            assert read_all(client) == b""
            stop.set()
    assert site.logged(logging.INFO, "sent no whole request")
    assert site.chat().status_code == 200


def test_a_connection_that_says_nothing_is_closed(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Connection, "headers_s", NO_TIME_S)
    with connected(site) as client:
        assert read_all(client) == b""
    assert site.logged(logging.INFO, "sent no whole request")


def test_a_connection_is_used_again_after_a_while(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two requests the bound is that of idle connections, not that of headers."""
    headers_s = 1.0  # also for the first request, which follows at once on the connection
    monkeypatch.setattr(Connection, "headers_s", headers_s)
    head, body = request_of()
    gate = Gate()
    site.runtime.on_forward = gate.wait
    with connected(site) as client:
        client.sendall(head + body)
        assert gate.reached.acquire(timeout=WAIT_S)
        threading.Event().wait(1.5 * headers_s)
        gate.open()
        assert b" 200 " in answer_on(client).split(b"\r\n")[0]
        threading.Event().wait(1.5 * headers_s)
        client.sendall(head + body)
        assert b" 200 " in answer_on(client).split(b"\r\n")[0]


def test_half_a_connection_is_none(site: Site) -> None:
    """A client that has closed its side for sending is taken for gone, as with every server on asyncio."""
    expected = text_of(site.chat())
    gate = Gate()
    site.runtime.on_forward = gate.wait
    head, body = request_of(stream=True)
    with connected(site) as client:
        client.sendall(head + body)
        assert gate.reached.acquire(timeout=WAIT_S)
        client.shutdown(socket.SHUT_WR)
        gate.open()
        read_all(client)
    site.runtime.on_forward = lambda _: None
    site.until(lambda: site.engine.num_open == 0)
    assert text_of(site.chat()) == expected
    assert site.status() == "ok"
