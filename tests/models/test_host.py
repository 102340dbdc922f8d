"""What is served, to whom, and how models take each other's place."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from tests.engine.harness import GREEDY, WAIT_S, Call, Client, GatedRuntime
from tests.models.fake_loader import NEEDED_NBYTES, FakeLoader, NamedRuntime

from dormouse.domain.errors import (
    ModelNotFound,
    ModelSwapped,
    QueueFull,
    ShuttingDown,
    SwapFailed,
    SwapInProgress,
    SwapRefused,
    Unavailable,
)
from dormouse.domain.plan import Plan
from dormouse.domain.requests import Finished
from dormouse.engine.loop import MOST_FAILED
from dormouse.models.aliases import Aliases
from dormouse.models.host import HostOptions, ModelHost
from dormouse.models.swap_counts import SwapOutcome
from dormouse.runtimes.base import Logits
from dormouse.store.block_store import BlockStore

BOTH_FIT = 10 * NEEDED_NBYTES
ONE_FITS = NEEDED_NBYTES // 2
NONE_FITS = -NEEDED_NBYTES
PROMPT = "a conversation that fills several blocks of sixteen tokens, so that something is kept"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[BlockStore]:
    with BlockStore.open(tmp_path, quota_nbytes=1 << 30) as store:
        yield store
        store.check()


@pytest.fixture
def loader(store: BlockStore) -> FakeLoader:
    return FakeLoader(store)


@asynccontextmanager
async def hosting(loader: FakeLoader, **options: object) -> AsyncIterator[ModelHost]:
    """A host that serves `a`; ended at the end."""
    host = ModelHost(None, loader, HostOptions(**options))  # type: ignore[arg-type]
    await host.start("a")
    try:
        yield host
    finally:
        loader.gate.set()
        await asyncio.to_thread(host.stop, 0.0)
        host.close()


async def ask(
    host: ModelHost, name: str, *, agent: str | None = None, max_tokens: int = 8
) -> tuple[str, Finished]:
    """A request as a dialect makes it, in a task of its own: the model that answered, and the end."""

    async def one() -> tuple[str, Finished]:
        served = await host.serve(name, "t")
        call = submit(served.engine, agent, max_tokens)
        return served.name, await asyncio.to_thread(call.finished)

    return await asyncio.wait_for(asyncio.create_task(one()), WAIT_S)


def submit(engine: object, agent: str | None = None, max_tokens: int = 8) -> Call:
    client = Client(engine)  # type: ignore[arg-type]
    return client.submit(PROMPT, dataclasses.replace(GREEDY, max_tokens=max_tokens), agent=agent)


def held(host: ModelHost, name: str) -> tuple[asyncio.Task[None], asyncio.Event]:
    """A request that holds a model until the event is set."""
    done = asyncio.Event()

    async def hold() -> None:
        await host.serve(name, "t")
        await done.wait()

    return asyncio.create_task(hold()), done


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something that other tasks bring about."""
    async with asyncio.timeout(WAIT_S):
        while not condition():
            await asyncio.sleep(0)


def in_loop(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(2 * WAIT_S):
            await test()

    asyncio.run(bounded())


def phase(host: ModelHost) -> str:
    assert host.change is not None
    return host.change.phase.value


# -- names -------------------------------------------------------------------------------------------


def test_aliases_mean_what_is_served(loader: FakeLoader) -> None:
    async def test() -> None:
        async with hosting(loader, aliases=Aliases.parse("claude-*, GPT-*,b")) as host:
            for name in ("a", "claude-opus-4-1", "gpt-5.2", "Claude-Haiku"):
                assert (await host.serve(name, "t")).name == host.model_of(name) == "a"
            with pytest.raises(ModelNotFound, match="this server has 'a'"):
                await host.serve("gemini", "t")
            with pytest.raises(ModelNotFound, match="models swap b"):
                await host.serve("b", "t")  # a model of this machine is itself, whatever the patterns say

    in_loop(test)


def test_without_aliases_a_name_is_a_name(loader: FakeLoader) -> None:
    async def test() -> None:
        async with hosting(loader, aliases=Aliases.parse("")) as host:
            with pytest.raises(ModelNotFound):
                await host.serve("claude-opus-4-1", "t")

    in_loop(test)


# -- starting ----------------------------------------------------------------------------------------


def test_requests_wait_for_the_first_model(loader: FakeLoader) -> None:
    async def test() -> None:
        host = ModelHost(None, loader)
        loader.gate.clear()
        starting = asyncio.create_task(host.start("a"))
        await asyncio.to_thread(loader.loading.acquire)
        with pytest.raises(Unavailable):
            _ = host.served
        waiting = asyncio.create_task(host.serve("a", "t"))
        await until(lambda: bool(host.describe()["waiting"]))
        assert not host.is_serving
        loader.gate.set()
        await starting
        assert (await waiting).name == "a"
        await asyncio.to_thread(host.stop, 0.0)
        host.close()

    in_loop(test)


def test_a_first_model_that_does_not_load_is_an_error(loader: FakeLoader) -> None:
    async def test() -> None:
        loader.failing = {"a"}
        host = ModelHost(None, loader)
        with pytest.raises(MemoryError):
            await host.start("a")
        with pytest.raises(Unavailable, match="no room for a"):
            await host.serve("a", "t")
        await asyncio.to_thread(host.stop, 0.0)

    in_loop(test)


# -- swaps -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("free", [BOTH_FIT, ONE_FITS])
def test_an_agent_sleeps_over_a_swap_and_continues(store: BlockStore, free: int) -> None:
    loader = FakeLoader(store, free=free)

    async def test() -> None:
        async with hosting(loader) as host:
            name, begun = await ask(host, "a", agent="ada")
            assert name == "a"
            change = await host.swap("b", 5.0)
            assert (change.beside, change.num_cut) == (free == BOTH_FIT, 0)
            assert (await ask(host, "b", agent="ada"))[0] == "b"
            with pytest.raises(ModelNotFound):
                await host.serve("a", "t")
            await host.swap("a", 5.0)
            _, end = await ask(host, "a", agent="ada", max_tokens=9)
            # All but the last token, whose logits are wanted.
            assert end.usage.disk_tokens == end.usage.prompt_tokens - 1
            assert end.tokens[:8] == begun.tokens
            assert host.swap_counts.by_outcome()[SwapOutcome.DONE] == 2
            assert [served.name for served in loader.unloaded] == ["a", "b"]

    in_loop(test)


def test_beside_nobody_waits_and_the_old_one_leaves_last(loader: FakeLoader) -> None:
    async def test() -> None:
        async with hosting(loader) as host:
            holder, done = held(host, "a")
            loader.gate.clear()
            swap = asyncio.create_task(host.swap("b", WAIT_S))
            await until(lambda: phase(host) == "loading")
            assert (await ask(host, "a"))[0] == "a"
            loader.gate.set()
            await until(lambda: phase(host) == "draining")
            assert (await ask(host, "b"))[0] == "b"
            assert loader.unloaded == []
            assert not swap.done()
            done.set()
            await holder
            assert (await swap).phase == "done"
            assert [served.name for served in loader.unloaded] == ["a"]

    in_loop(test)


def test_in_turn_new_requests_wait_for_the_new_model(store: BlockStore) -> None:
    loader = FakeLoader(store, free=ONE_FITS)

    async def test() -> None:
        async with hosting(loader, aliases=Aliases.parse("any")) as host:
            holder, done = held(host, "a")
            await asyncio.sleep(0)
            swap = asyncio.create_task(host.swap("b", WAIT_S))
            await until(lambda: phase(host) == "draining")
            waiting = [asyncio.create_task(ask(host, name)) for name in ("b", "any")]
            gone = asyncio.create_task(ask(host, "a"))
            await until(lambda: sum(host.describe()["waiting"].values()) == 3)
            assert not host.is_serving
            assert loader.num_loads["b"] == 0, "the old one is still held"
            done.set()
            await holder
            await swap
            assert [(await task)[0] for task in waiting] == ["b", "b"]
            with pytest.raises(ModelNotFound):
                await gone

    in_loop(test)


def test_who_waits_too_long_is_told_when_to_come_back(store: BlockStore) -> None:
    loader = FakeLoader(store, free=ONE_FITS)

    async def test() -> None:
        async with hosting(loader, wait_s=0.01, max_waiting=1) as host:
            loader.gate.clear()
            swap = asyncio.create_task(host.swap("b", WAIT_S))
            await until(lambda: phase(host) == "loading")
            asked = [asyncio.create_task(host.serve("b", tenant)) for tenant in ("t", "t", "another")]
            first, second, other = asked
            with pytest.raises(QueueFull):
                await second
            with pytest.raises(Unavailable) as refused:
                await first
            assert refused.value.retry_after_s >= 1
            with pytest.raises(Unavailable):
                await other  # another tenant had a place
            loader.gate.set()
            await swap

    in_loop(test)


def test_who_waits_keeps_his_place_when_he_is_woken_for_nothing(store: BlockStore) -> None:
    """The room is full of one tenant when another comes; everybody looks again, and nobody is sent away."""
    loader = FakeLoader(store, free=ONE_FITS)

    async def test() -> None:
        async with hosting(loader, max_waiting=4) as host:
            loader.gate.clear()
            swap = asyncio.create_task(host.swap("b", WAIT_S))
            await until(lambda: phase(host) == "loading")
            waiting = [asyncio.create_task(host.serve("b", tenant)) for tenant in "ttttuu"]
            await until(lambda: host.describe()["waiting"] == {"b": 6})
            for _ in range(10):
                host._waiting.wake()
                await asyncio.sleep(0)
            loader.gate.set()
            await swap
            assert [(await task).name for task in waiting] == ["b"] * 6

    in_loop(test)


class NamedGate(GatedRuntime, NamedRuntime):
    def __init__(self, name: str, num_pages: int) -> None:
        NamedRuntime.__init__(self, name, num_pages)
        self.allow = threading.Semaphore(0)
        self.started = threading.Semaphore(0)
        self.plans = []


@pytest.mark.parametrize("free", [BOTH_FIT, ONE_FITS])
def test_a_request_past_the_deadline_is_saved_told_and_continued(store: BlockStore, free: int) -> None:
    runtimes: list[NamedGate] = []

    def make(name: str) -> NamedGate:
        runtimes.append(NamedGate(name, 64))
        if len(runtimes) > 1:
            runtimes[-1].run_freely()
        return runtimes[-1]

    loader = FakeLoader(store, free=free, make=make)

    async def test() -> None:
        async with hosting(loader) as host:
            first = runtimes[0]
            first.allow.release(4)  # the prompt and three tokens
            call = submit(host.served.engine, "ada", max_tokens=200)
            for _ in range(5):
                assert await asyncio.to_thread(first.started.acquire, timeout=WAIT_S)
            swap = asyncio.create_task(host.swap("b", 0.0))
            await until(lambda: phase(host) == "draining")
            while not swap.done():  # step by step: the reply must not end before its engine is told
                first.allow.release()
                await asyncio.wait([swap], timeout=0.05)
            change = await swap
            assert change.num_cut == 1
            error = (await asyncio.to_thread(call.failed)).error
            assert isinstance(error, ModelSwapped)
            assert "it goes on from there" in str(error)
            kept = store.agent("default", "ada").num_tokens
            assert kept >= len(PROMPT) + 4
            await host.swap("a", 5.0)
            _, end = await ask(host, "a", agent="ada", max_tokens=200)
            assert end.usage.disk_tokens == len(PROMPT) - 1
            assert len(end.tokens) == 200

    in_loop(test)


# -- failures ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "free", "error", "why"),
    [
        ("nowhere", BOTH_FIT, ModelNotFound, "nowhere"),
        ("odd", BOTH_FIT, SwapRefused, "no layers"),
        ("b", NONE_FITS, SwapRefused, "memory"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_touched(
    store: BlockStore, name: str, free: int, error: type[Exception], why: str
) -> None:
    loader = FakeLoader(store, free=free)

    async def test() -> None:
        async with hosting(loader) as host:
            engine = host.served.engine
            with pytest.raises(error, match=why):
                await host.swap(name, 5.0)
            assert host.served.engine is engine
            assert host.is_serving
            assert not engine.is_stopping
            assert (await ask(host, "a"))[0] == "a"
            assert host.swap_counts.by_outcome()[SwapOutcome.REFUSED] == 1

    in_loop(test)


@pytest.mark.parametrize("free", [BOTH_FIT, ONE_FITS])
def test_a_failed_load_brings_the_old_model_back_with_its_agents(store: BlockStore, free: int) -> None:
    loader = FakeLoader(store, free=free)

    async def test() -> None:
        async with hosting(loader) as host:
            _, before = await ask(host, "a", agent="ada")
            loader.failing = {"b"}
            with pytest.raises(SwapFailed, match="no room for b") as failed:
                await host.swap("b", 5.0)
            assert "'a'" in str(failed.value)
            assert host.swap_counts.by_outcome()[SwapOutcome.ROLLED_BACK] == 1
            assert host.is_serving
            name, after = await ask(host, "a", agent="ada")
            assert (name, after.tokens) == ("a", before.tokens)
            assert after.usage.cached_tokens == len(PROMPT) - 1
            loader.failing = set()
            assert (await host.swap("b", 5.0)).phase == "done"

    in_loop(test)


def test_when_nothing_loads_it_says_so_and_a_swap_helps(store: BlockStore) -> None:
    loader = FakeLoader(store, free=ONE_FITS)

    async def test() -> None:
        async with hosting(loader) as host:
            loader.failing = {"a", "b"}
            with pytest.raises(SwapFailed, match="neither could 'a' again"):
                await host.swap("b", 5.0)
            assert not host.is_serving
            assert host.swap_counts.by_outcome()[SwapOutcome.FAILED] == 1
            with pytest.raises(Unavailable, match="no model is served"):
                await host.serve("a", "t")
            loader.failing = set()
            await host.swap("a", 5.0)
            assert (await ask(host, "a"))[0] == "a"

    in_loop(test)


class Dying(NamedRuntime):
    def forward(self, plan: Plan) -> Logits:
        raise MemoryError(f"no room for {plan.num_tokens} tokens")


def test_a_dead_engine_can_be_replaced(store: BlockStore) -> None:
    loader = FakeLoader(store, make=lambda name: Dying(name, 8) if name == "a" else NamedRuntime(name, 64))

    async def test() -> None:
        async with hosting(loader) as host:
            for _ in range(MOST_FAILED):
                assert (await asyncio.to_thread(submit(host.served.engine).failed)).error
            await until(lambda: host.served.engine.death is not None)
            await host.swap("b", 5.0)
            assert (await ask(host, "b"))[0] == "b"

    in_loop(test)


def test_a_second_swap_is_refused_meanwhile(loader: FakeLoader) -> None:
    async def test() -> None:
        async with hosting(loader) as host:
            loader.gate.clear()
            first = asyncio.create_task(host.swap("b", 5.0))
            await until(lambda: phase(host) == "loading")
            with pytest.raises(SwapInProgress, match="'b'"):
                await host.swap("c", 5.0)
            loader.gate.set()
            await first
            assert host.served.name == "b"

    in_loop(test)


def test_a_swap_goes_on_when_nobody_waits_for_it(loader: FakeLoader) -> None:
    async def test() -> None:
        async with hosting(loader) as host:
            loader.gate.clear()
            swap = asyncio.create_task(host.swap("b", 5.0))
            await until(lambda: phase(host) == "loading")
            swap.cancel()
            loader.gate.set()
            await until(lambda: phase(host) == "done")
            assert host.served.name == "b"

    in_loop(test)


def test_a_swap_to_what_is_served_does_nothing(loader: FakeLoader) -> None:
    async def test() -> None:
        async with hosting(loader) as host:
            engine = host.served.engine
            assert (await host.swap("a", 5.0)).phase == "done"
            assert host.served.engine is engine
            assert loader.num_loads["a"] == 1

    in_loop(test)


@pytest.mark.parametrize("free", [BOTH_FIT, ONE_FITS])
def test_the_end_of_the_server_ends_a_swap(store: BlockStore, free: int) -> None:
    loader = FakeLoader(store, free=free)

    async def test() -> None:
        async with hosting(loader) as host:
            loader.gate.clear()
            swap = asyncio.create_task(host.swap("b", 5.0))
            await until(lambda: phase(host) == "loading")
            waiting = asyncio.create_task(host.serve("b", "t"))
            await asyncio.sleep(0)
            stop = asyncio.create_task(asyncio.to_thread(host.stop, 0.0))
            await until(lambda: host.is_closing)
            with pytest.raises(ShuttingDown):
                await waiting
            assert not stop.done()
            loader.gate.set()
            with pytest.raises(ShuttingDown):
                await swap
            await stop
            assert "b" in [served.name for served in loader.unloaded]
            assert host.served.name == "a"

    in_loop(test)


# -- turns -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("free", [BOTH_FIT, ONE_FITS])
def test_the_request_decides_and_nobody_starves(store: BlockStore, free: int) -> None:
    """Three clients that never pause, one for each model: all of them get all of their answers."""
    loader = FakeLoader(store, free=free)
    served: list[str] = []

    async def client(host: ModelHost, name: str) -> None:
        for _ in range(6):
            answered, _ = await ask(host, name)
            assert answered == name
            served.append(name)

    async def test() -> None:
        async with hosting(loader, auto_swap=True, stay_s=0.02, wait_s=WAIT_S) as host:
            await asyncio.gather(*(client(host, name) for name in "abc"))
            assert sorted(served) == sorted("abc" * 6)
            # Each turn serves all of its model's requests; without stays there would be one swap a request.
            assert host.swap_counts.by_outcome()[SwapOutcome.DONE] <= len(served)

    in_loop(test)


@pytest.mark.parametrize("free", [BOTH_FIT, ONE_FITS])
def test_a_flood_on_one_model_does_not_starve_another(store: BlockStore, free: int) -> None:
    loader = FakeLoader(store, free=free)
    is_over = False

    async def flood(host: ModelHost) -> int:
        count = 0
        while not is_over:
            await ask(host, "a")
            count += 1
        return count

    async def test() -> None:
        nonlocal is_over
        async with hosting(loader, auto_swap=True, stay_s=0.05, wait_s=WAIT_S) as host:
            floods = [asyncio.create_task(flood(host)) for _ in range(4)]
            for _ in range(3):
                assert (await ask(host, "b"))[0] == "b"
            is_over = True
            assert all(await asyncio.gather(*floods))

    in_loop(test)


def test_a_model_stays_before_it_leaves(loader: FakeLoader) -> None:
    async def test() -> None:
        async with hosting(loader, auto_swap=True, stay_s=3600.0) as host:
            other = asyncio.create_task(ask(host, "b"))
            await until(lambda: host.describe()["waiting"] == {"b": 1})
            assert (await ask(host, "a"))[0] == "a"
            assert loader.num_loads["b"] == 0
            await asyncio.to_thread(host.stop, 0.0)
            with pytest.raises(ShuttingDown):
                await other

    in_loop(test)


def test_turns_cut_nobody(store: BlockStore) -> None:
    loader = FakeLoader(store, free=ONE_FITS)

    async def test() -> None:
        async with hosting(loader, auto_swap=True, stay_s=0.0, wait_s=WAIT_S) as host:
            holder, done = held(host, "a")
            await asyncio.sleep(0)
            other = asyncio.create_task(ask(host, "b"))
            await until(lambda: phase(host) == "draining")
            late = asyncio.create_task(ask(host, "a"))
            await until(lambda: host.describe()["waiting"] == {"b": 1, "a": 1})
            assert loader.num_loads["b"] == 0
            done.set()
            await holder
            assert (await other)[0] == "b"
            assert (await late)[0] == "a"
            assert host.change is not None
            assert host.change.num_cut == 0

    in_loop(test)


def test_a_model_that_cannot_be_had_fails_those_who_want_it(loader: FakeLoader) -> None:
    async def test() -> None:
        async with hosting(loader, auto_swap=True, stay_s=0.0) as host:
            with pytest.raises(SwapRefused, match="no layers"):
                await ask(host, "odd")
            with pytest.raises(ModelNotFound):
                await ask(host, "nowhere")
            assert (await ask(host, "a"))[0] == "a"

    in_loop(test)
