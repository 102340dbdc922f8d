"""Agents that are deleted, forked, exported and more while they reply, many of them, by many at once."""

from __future__ import annotations

import json
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from benchmarks.figures import Scale
from benchmarks.flood import Client
from benchmarks.server import Server
from safetensors import safe_open
from tests.fake_server import PAGE, fake_server
from tests.live import WAIT_S, at_once, block_files
from tests.stress.watch import assert_store_is_whole, idle, written

from dormouse.runtimes.fake import decode

pytestmark = pytest.mark.timeout(600)

FIRST = 20
LONG = 600
ENDLESS = 3000
"""Longer than most deletions take."""
OTHERS = 4
EXPORTS = 5


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("replying") / "data"


@pytest.fixture(scope="module")
def server(data: Path) -> Iterator[Server]:
    with fake_server(data, "--pages", "320", "--max-running", "32") as server:
        yield server
    assert_store_is_whole(data)


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


@dataclass(frozen=True)
class Heard:
    """A streamed reply: its text, and the code of the error that ended it, or else why it ended."""

    text: str
    error: str | None = None
    finish: str | None = None


def listen(http: httpx.Client, client: Client, on_begun: Callable[[], None] = lambda: None) -> Heard:
    """Ask, and read the stream to its end; `on_begun` is called when there is an answer. Raises RuntimeError
    when it has no end."""
    text, finish = "", None
    headers = {"x-agent-id": client.agent}
    with http.stream("POST", "/v1/chat/completions", json=client.body, headers=headers) as answer:
        on_begun()
        if answer.is_error:
            return Heard("", json.loads(answer.read())["error"]["code"])
        for line in answer.iter_lines():
            if line == "data: [DONE]":
                return Heard(text, finish=finish)
            if line.startswith("data: "):
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    return Heard(text, event["error"]["code"])
                for choice in event["choices"]:
                    text += choice["delta"].get("content", "")
                    finish = choice["finish_reason"]
    raise RuntimeError(f"the stream of {client.agent} was cut without a word")


@contextmanager
def replying(http: httpx.Client, clients: Sequence[Client]) -> Iterator[list[Future[Heard]]]:
    """All of them have begun to reply when the block begins, and few have ended unless the machine paused;
    what each heard is there at the latest after it."""
    with ThreadPoolExecutor(len(clients)) as threads:
        begun = threading.Semaphore(0)
        heard = [threads.submit(listen, http, client, begun.release) for client in clients]
        for _ in clients:
            assert begun.acquire(timeout=WAIT_S), "somebody hears nothing"
        yield heard


def delete(http: httpx.Client, agent: str) -> None:
    """Ask until it is gone: a slow disk may need longer for a crowd of deletions than one of them waits."""
    answer = http.delete(f"/v1/agents/{agent}")
    if answer.status_code == httpx.codes.GATEWAY_TIMEOUT:
        written(http)
        answer = http.delete(f"/v1/agents/{agent}")
        assert answer.status_code in (httpx.codes.OK, httpx.codes.NOT_FOUND), answer.text
    else:
        assert answer.status_code == httpx.codes.OK, answer.text


def export(http: httpx.Client, agent: str) -> bytes:
    """Its file. One that is cut short, because the agent went on meanwhile and left a tail behind, is asked
    for again: that may happen once or twice, while a reply ends."""
    for _ in range(EXPORTS):
        with suppress(httpx.RemoteProtocolError):
            return http.get(f"/v1/agents/{agent}/export").raise_for_status().content
    raise RuntimeError(f"{EXPORTS} exports of {agent} were cut short")


def stored_texts(data: Path) -> list[str]:
    """What the block files are of; a token is a character."""
    found = []
    for file in block_files(data):
        with safe_open(file, "numpy") as opened:
            found.append(decode(opened.get_tensor("tokens").tolist()))
    return found


def test_agents_are_deleted_while_they_reply(
    data: Path, http: httpx.Client, scale: Scale, figures: dict[str, Any]
) -> None:
    """S28: each stream says that its agent is gone; nothing of it is found or stored; others talk on."""
    doomed = [Client.asking(f"doomed-{i}", f"doomed {i} " * 8, ENDLESS) for i in range(scale(16, 100))]
    others = [Client.asking(f"spared-{i}", f"spared {i} " * 8, LONG) for i in range(OTHERS)]
    expected = [listen(http, client) for client in others]
    blocks = written(http)["num_blocks"]
    with replying(http, [*doomed, *others]) as heard:
        at_once([partial(delete, http, client.agent) for client in doomed])
    ends = [one.result() for one in heard]
    # On a slow disk the deletions take long, and one or the other had said all of it before its own.
    whole = [end for end in ends[: len(doomed)] if end.finish == "length"]
    cut = [end for end in ends[: len(doomed)] if end not in whole]
    assert cut
    assert {end.error for end in cut} == {"agent_not_found"}
    assert ends[len(doomed) :] == expected, "others say what they would have said"
    idle(http)
    # Those who were spared had to make room now and then: what they left there is found again, or collected.
    assert written(http)["num_blocks"] < blocks + len(doomed), "each had several"
    assert not [text for text in stored_texts(data) if "doomed" in text]
    assert http.get("/v1/agents", params={"prefix": "doomed-"}).json()["data"] == []
    body = {**doomed[-1].body, "stream": False, "max_tokens": 1}
    found = http.post("/v1/chat/completions", json=body).json()["usage"]["prompt_tokens_details"]
    assert found["cached_tokens"] < PAGE
    figures |= {
        "deleted": len(doomed),
        "cut": len(cut),
        "had_said": sorted(len(end.text) for end in ends[: len(doomed)]),
    }


def begin(http: httpx.Client, count: int, name: str) -> tuple[list[Client], list[Client]]:
    """The first turns of so many agents, which are said, and their second ones, with long replies."""
    firsts = [Client.asking(f"{name}-{i}", f"{name} {i} " * 8, FIRST) for i in range(count)]
    replies = [listen(http, client) for client in firsts]
    seconds = [
        Client(
            client.agent,
            (
                *client.messages,
                {"role": "assistant", "content": reply.text},
                {"role": "user", "content": "and then?"},
            ),
            LONG,
        )
        for client, reply in zip(firsts, replies, strict=True)
    ]
    return firsts, seconds


def sizes(http: httpx.Client, clients: Sequence[Client]) -> list[int]:
    """Tokens of each agent, as last saved."""
    return [http.get(f"/v1/agents/{client.agent}").json()["tokens"] for client in clients]


def renamed(client: Client, name: str, max_tokens: int = LONG) -> Client:
    return Client(name, client.messages, max_tokens)


def test_agents_are_forked_while_they_reply(
    http: httpx.Client, scale: Scale, figures: dict[str, Any]
) -> None:
    """S28: a fork is what was last saved; it goes on in the words that the original is about to say, and the
    original says them."""
    firsts, seconds = begin(http, scale(8, 30), "forked")
    written(http)
    before = sizes(http, firsts)
    with replying(http, seconds) as heard:
        forks = at_once(
            [
                partial(http.post, f"/v1/agents/{client.agent}/fork", json={"name": f"{client.agent}-fork"})
                for client in firsts
            ]
        )
    said = [one.result() for one in heard]
    assert {one.error for one in said} == {None}
    written(http)
    after = sizes(http, firsts)
    assert {fork.status_code for fork in forks} == {201}
    forked = [fork.json()["tokens"] for fork in forks]
    # On a slow machine one or the other had said all of it, and saved it, before it was forked.
    assert [size in turns for size, *turns in zip(forked, before, after, strict=True)] == [True] * len(forks)
    again = [listen(http, renamed(client, f"{client.agent}-fork")) for client in seconds]
    assert again == said
    early = sum(size == turn for size, turn in zip(forked, before, strict=True))
    assert early
    figures |= {"forked": len(forks), "forked_while_replying": early}


def test_agents_are_exported_while_they_reply(
    http: httpx.Client, scale: Scale, figures: dict[str, Any]
) -> None:
    """S28: each file is whole, and the agent that is made of it goes on as the original does."""
    _, seconds = begin(http, scale(8, 30), "exported")
    written(http)
    with replying(http, seconds) as heard:
        files = at_once([partial(export, http, client.agent) for client in seconds])
    said = [one.result() for one in heard]
    assert {one.error for one in said} == {None}
    names = [f"{client.agent}-taken" for client in seconds]
    for name, file in zip(names, files, strict=True):
        taken = http.post("/v1/agents/import", params={"name": name}, content=file)
        assert taken.status_code == 201, taken.text
    again = [listen(http, renamed(client, name)) for client, name in zip(seconds, names, strict=True)]
    assert again == said
    figures |= {"exported": len(files), "bytes": sum(map(len, files))}


NAMES = [f"churned-{i}" for i in range(6)]
TEXTS = [f"churn {i} " * (3 + 5 * i) for i in range(8)]
CUT = 0
"""Instead of a status: the connection was closed before the end of the body."""
ALLOWED: dict[str, set[int]] = {
    "say": {200, 404},  # deleted while it replied
    "create": {201, 404, 409},
    "tell": {200, 400, 404, 409},  # of who talks by chat completions nothing is kept
    "fork": {201, 404, 409},
    "checkpoint": {201, 404, 409},
    "rollback": {200, 404, 409},
    "sleep": {200, 404},
    "wake": {202, 404},
    "export": {200, 404, CUT},
    "import": {201, 404},  # deleted before it could be shown
    "show": {200, 404},
    "list": {200},
    "delete": {200, 404},
}
"""What each of these may be answered while others do the same to the same agents."""


@dataclass
class Churner:
    """Does something to some agent, again and again."""

    server: Server
    seed: int
    expected: dict[str, str]
    archive: bytes

    def run(self, num_actions: int) -> tuple[Counter[tuple[str, int]], list[str]]:
        """Counts of actions with statuses, and what was wrong."""
        told: Counter[tuple[str, int]] = Counter()
        wrong: list[str] = []
        choose = random.Random(self.seed)
        with self.server.client() as http:
            for _ in range(num_actions):
                action = choose.choice(sorted(ALLOWED))
                try:
                    answer = self._act(http, action, choose, wrong)
                    status, text = answer.status_code, answer.text[:200]
                except httpx.RemoteProtocolError as error:
                    status, text = CUT, str(error)
                told[action, status] += 1
                if status not in ALLOWED[action]:
                    wrong.append(f"{action}: {status} {text}")
        return told, wrong

    def _act(
        self, http: httpx.Client, action: str, choose: random.Random, wrong: list[str]
    ) -> httpx.Response:
        name, tag = choose.choice(NAMES), choose.choice("xy")
        agent = f"/v1/agents/{name}"
        if action == "say":
            return self._say(http, name, choose.choice(TEXTS), wrong)
        if action == "create":
            return http.post("/v1/agents", json={"name": name})
        if action == "tell":
            body = {"messages": [{"role": "user", "content": "more"}], "max_tokens": 4, "temperature": 0}
            return http.post(f"{agent}/messages", json=body)
        if action == "fork":
            return http.post(f"{agent}/fork", json={"name": choose.choice(NAMES)})
        if action == "checkpoint":
            return http.post(f"{agent}/checkpoints", json={"name": tag})
        if action == "rollback":
            return http.post(f"{agent}/rollback", json={"checkpoint": tag})
        if action == "import":
            path = f"/v1/agents/import?name={name}&overwrite=true"
            return http.post(path, content=self.archive)
        if action in ("sleep", "wake"):
            return http.post(f"{agent}/{action}")
        if action == "list":
            return http.get("/v1/agents")
        if action == "delete":
            return http.delete(agent)
        return http.get(f"{agent}/export" if action == "export" else agent)

    def _say(self, http: httpx.Client, name: str, text: str, wrong: list[str]) -> httpx.Response:
        body = {**Client.asking(name, text, FIRST).body, "stream": False}
        answer = http.post("/v1/chat/completions", json=body, headers={"x-agent-id": name})
        if answer.status_code == httpx.codes.OK:
            said = answer.json()["choices"][0]["message"]["content"]
            if said != self.expected[text]:
                wrong.append(f"{name} was asked {text!r} and said {said!r}")
        return answer


def test_anything_at_once_to_the_same_agents(
    server: Server, http: httpx.Client, scale: Scale, figures: dict[str, Any]
) -> None:
    """S28: everything that can be done to an agent, in any order, by eight at once: only answers that make
    sense, no wrong word, and books that balance at the end."""
    expected = {text: listen(http, Client.asking("asked", text, FIRST)).text for text in TEXTS}
    written(http)
    archive = http.get("/v1/agents/asked/export").raise_for_status().content
    num_actions = scale(60, 1500)
    churners = [Churner(server, seed, expected, archive) for seed in range(8)]
    results = at_once([partial(churner.run, num_actions) for churner in churners])
    told: Counter[tuple[str, int]] = sum((counts for counts, _ in results), Counter())
    assert [problem for _, wrong in results for problem in wrong] == []
    assert {action for action, _ in told} == ALLOWED.keys()
    idle(http)
    for text in TEXTS:
        assert listen(http, Client.asking("churned-0", text, FIRST)) == Heard(expected[text], finish="length")
    figures |= {"actions": told.total(), "told": {f"{a} {s}": told[a, s] for a, s in sorted(told)}}
