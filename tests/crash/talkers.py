"""Agents that are talked to while servers die, each with the script of a twin to which nothing happens."""

from __future__ import annotations

import json
import random
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from tests.crash.servers import Killable, Model

from dormouse.domain.agents import DEFAULT_TENANT
from dormouse.store.block_store import BlockStore

QUOTA = 64 << 20
UNAVAILABLE = 503
NOT_FOUND = 404
CONFLICT = 409
FORK_SHARE, DROP_SHARE, SLEEP_SHARE = 0.10, 0.15, 0.5
"""How often an agent is forked, loses a fork (the rest up to it), and, without `sync`, is put to sleep."""


class Cut(Exception):
    """The server is going or gone."""


@dataclass(frozen=True, slots=True)
class Script:
    """What is said to an agent, what it replies, its tokens after each turn, and all of them at the end."""

    said: tuple[str, ...]
    replies: tuple[str, ...]
    lengths: tuple[int, ...]
    tokens: tuple[int, ...]

    def messages(self, num_turns: int) -> list[dict[str, str]]:
        """The conversation after so many turns."""
        turns = zip(self.said[:num_turns], self.replies[:num_turns], strict=True)
        return [
            {"role": role, "content": text}
            for said, reply in turns
            for role, text in (("user", said), ("assistant", reply))
        ]


def client_of(server: Killable) -> httpx.Client:
    """A client for all threads."""
    return httpx.Client(base_url=server.url, timeout=120, trust_env=False)


def call(client: httpx.Client, method: str, path: str, **kwargs: Any) -> httpx.Response:
    """An answer that is none of a server's last words. Raises Cut, and AssertionError for any error but 404
    and 409."""
    try:
        answer = client.request(method, path, **kwargs)
    except httpx.TransportError as error:
        raise Cut from error
    if answer.status_code == UNAVAILABLE:
        raise Cut
    assert not answer.is_error or answer.status_code in (NOT_FOUND, CONFLICT), answer.text
    return answer


def body_of(messages: list[dict[str, str]], model: Model) -> dict[str, Any]:
    """A greedy chat completion."""
    return {"model": model.name, "messages": messages, "temperature": 0, "max_tokens": model.reply_tokens}


def stream(client: httpx.Client, body: dict[str, Any], agent: str) -> str:
    """The text of a streamed reply, once it was told to be complete. Raises Cut."""
    pieces: list[str] = []
    try:
        with client.stream(
            "POST", "/v1/chat/completions", json=body | {"stream": True}, headers={"x-agent-id": agent}
        ) as answer:
            if answer.status_code == UNAVAILABLE:
                raise Cut
            assert not answer.is_error, answer.read().decode()
            for line in answer.iter_lines():
                if line == "data: [DONE]":
                    return "".join(pieces)
                if line.startswith("data: "):
                    chunk = json.loads(line.removeprefix("data: "))
                    if "error" in chunk:
                        assert "shut" in chunk["error"]["message"], chunk
                        raise Cut
                    pieces += [choice["delta"].get("content") or "" for choice in chunk["choices"]]
    except httpx.TransportError as error:
        raise Cut from error
    raise Cut


def record(model: Model, folder: Path) -> list[Script]:
    """The scripts of all agents, by a server of their own that is left alone."""
    rng = random.Random(model.name)
    words = (
        "the",
        "dormouse",
        "sleeps",
        "in",
        "a",
        "teapot",
        "until",
        "somebody",
        "asks",
        "for",
        "more",
        "tea",
    )
    said = [
        tuple(f"{n}.{turn}: {' '.join(rng.choices(words, k=12))}?" for turn in range(model.num_turns))
        for n in range(model.num_agents)
    ]
    found: list[tuple[list[str], list[int]]] = []
    server: Killable = model.server(folder, "sync")
    try:
        assert server.wait_until_ready(), "the twin does not start"
        with client_of(server) as client:
            for number in range(model.num_agents):
                replies: list[str] = []
                lengths: list[int] = []
                for turn in range(model.num_turns):
                    so_far = Script(said[number], tuple(replies), (), ()).messages(turn)
                    messages = [*so_far, {"role": "user", "content": said[number][turn]}]
                    replies.append(stream(client, body_of(messages, model), f"agent-{number}"))
                    lengths.append(client.get(f"/v1/agents/agent-{number}").json()["tokens"])
                found.append((replies, lengths))
        server.terminate()
        assert server.join() == 0
    finally:
        server.kill()
    with BlockStore.open(folder, quota_nbytes=QUOTA) as store:
        histories = [
            tuple(store.history(store.agent(DEFAULT_TENANT, f"agent-{number}").id))
            for number in range(model.num_agents)
        ]
    return [
        Script(said[number], tuple(replies), tuple(lengths), histories[number])
        for number, (replies, lengths) in enumerate(found)
    ]


@dataclass
class Talker:
    """One agent's client, which outlives the servers. An agent that has said all is deleted, and another
    begins with the same words.

    `told` turns are durable by the server's own word; `turn` is the next one. `forks` stand where they were
    made; `doubtful` names were being made or deleted when the server went.
    """

    number: int
    script: Script
    model: Model
    rng: random.Random
    counts: Counter[str]
    generation: int = 0
    turn: int = 0
    told: int = 0
    forks: dict[str, int] = field(default_factory=dict)
    deleted: set[str] = field(default_factory=set)
    doubtful: set[str] = field(default_factory=set)
    doing: str = ""
    error: BaseException | None = None

    @property
    def name(self) -> str:
        """Of the agent of this generation."""
        return f"agent-{self.number}.{self.generation}"

    @property
    def server_keeps_it(self) -> bool:
        """Whether only new messages travel."""
        return self.number % 2 == 1

    def expected(self) -> Mapping[str, int]:
        """The agents that have to be there, and their turns at least."""
        known = dict(self.forks)
        if self.told:
            known[self.name] = self.told
        return {name: turns for name, turns in known.items() if name not in self.doubtful}

    def run(self, client: httpx.Client, stop: threading.Event, sync: bool) -> None:
        """Talk until the server goes or `stop` is set; what is wrong is in `error`."""
        try:
            self._catch_up(client)
            while not stop.is_set():
                self._do(client, sync)
        except Cut:
            pass
        except BaseException as error:  # noqa: BLE001 - the main thread raises it
            self.error = error

    def _do(self, client: httpx.Client, sync: bool) -> None:
        chance = self.rng.random()
        if self.turn == len(self.script.said):
            self._begin_anew(client)
        elif chance < FORK_SHARE and self.told == self.turn > 0:
            self._fork(client)
        elif FORK_SHARE <= chance < DROP_SHARE and self.forks:
            self._delete(client, self.rng.choice(sorted(self.forks)))
        else:
            self._say(client)
            if sync:
                self.told = self.turn
            elif self.rng.random() < SLEEP_SHARE:
                self._sleep(client)

    def _say(self, client: httpx.Client) -> None:
        self.doing = "reply"
        turn = self.turn
        said = {"role": "user", "content": self.script.said[turn]}
        if self.server_keeps_it:
            if not turn:
                call(client, "POST", "/v1/agents", json={"name": self.name})  # 409 when it is there
            body = body_of([said], self.model)
            del body["model"]
            answer = call(client, "POST", f"/v1/agents/{self.name}/messages", json=body)
            reply = answer.json()["choices"][0]["message"]["content"]
        else:
            reply = stream(client, body_of([*self.script.messages(turn), said], self.model), self.name)
        assert reply == self.script.replies[turn], (
            f"{self.name}, turn {turn}: {reply!r} instead of {self.script.replies[turn]!r}"
        )
        self.turn = turn + 1
        self.counts["replies_compared"] += 1
        self.doing = ""

    def _sleep(self, client: httpx.Client) -> None:
        self.doing = "sleep"
        agent = call(client, "POST", f"/v1/agents/{self.name}/sleep").json()
        assert agent["durable_tokens"] >= agent["tokens"] - 1, agent
        self.told = self.turn
        self.doing = ""

    def _fork(self, client: httpx.Client) -> None:
        name = f"{self.name}-fork{self.turn}-{self.rng.randrange(1 << 30)}"
        self.doing = "fork"
        self.doubtful.add(name)
        answer = call(client, "POST", f"/v1/agents/{self.name}/fork", json={"name": name})
        # More, when the server has a turn that it had not told when it was killed.
        assert answer.json()["tokens"] >= self.script.lengths[self.turn - 1], answer.text
        self.forks[name] = self.turn
        self.doubtful.discard(name)
        self.doing = ""

    def _delete(self, client: httpx.Client, name: str) -> None:
        self.doing = "delete"
        self.doubtful.add(name)
        call(client, "DELETE", f"/v1/agents/{name}")
        self.forks.pop(name, None)
        self.deleted.add(name)
        self.doubtful.discard(name)
        self.doing = ""

    def _begin_anew(self, client: httpx.Client) -> None:
        for name in sorted(self.forks):
            self._delete(client, name)
        self._delete(client, self.name)
        self.generation += 1
        self.turn = self.told = 0

    def _catch_up(self, client: httpx.Client) -> None:
        """After a start: what was told is there; on from it, or from what the server has beyond that."""
        self.doing = ""
        for name in sorted(self.doubtful):
            self._delete(client, name)  # 404 when it is gone
            if name == self.name:
                self.generation += 1
                self.turn = self.told = 0
        self.turn = self.told
        if not self.told and not self.server_keeps_it:
            return
        answer = call(client, "GET", f"/v1/agents/{self.name}")
        if answer.status_code == NOT_FOUND:
            assert not self.told, f"{self.name} is gone"
            return
        if self.told:
            least = self.script.lengths[self.told - 1]
            agent = answer.json()
            assert agent["tokens"] >= least, f"{self.name} has {agent['tokens']} of {least} tokens"
            assert agent["durable_tokens"] >= least - 1, f"{self.name}: {agent['durable_tokens']} of {least}"
            self.counts["told_replies_found"] += self.told
        if self.server_keeps_it:
            kept = call(client, "GET", f"/v1/agents/{self.name}/messages").json()["data"]
            self.turn = len(kept) // 2
            assert self.turn >= self.told, f"{self.name}: {self.turn} of {self.told} turns are kept"
            assert kept == self.script.messages(self.turn), f"{self.name}: {kept}"


def turns_of(store: BlockStore, talkers: list[Talker]) -> Iterator[str]:
    """What is wrong with the agents in a store that nobody serves."""
    there = {agent.id.name: agent for agent in store.agents()}
    for talker in talkers:
        script = talker.script
        for name, turns in talker.expected().items():
            if name not in there:
                yield f"{name} is gone after {turns} turns"
        for name, agent in there.items():
            if not name.startswith(f"agent-{talker.number}."):
                continue
            if name in talker.deleted:
                yield f"{name} is back"
            tokens = tuple(store.history(agent.id))
            if tokens != script.tokens[: len(tokens)]:
                yield f"{name} has other tokens"
            turns = talker.expected().get(name, 0)
            if turns and len(tokens) < script.lengths[turns - 1]:
                yield f"{name} has {len(tokens)} tokens of {script.lengths[turns - 1]}"
