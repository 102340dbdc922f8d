"""The threads that prompts are made on."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import Iterator

import pytest

from dormouse.models.workers import Workers

WAIT_S = 20


@pytest.fixture
def workers() -> Iterator[Workers]:
    workers = Workers("the prompt", WAIT_S)
    yield workers
    workers.close()


def test_a_call_returns_and_raises_what_the_function_does(workers: Workers) -> None:
    assert asyncio.run(workers.run("acme", divmod, 7, 2)) == (3, 1)
    assert asyncio.run(workers.run("acme", int, "ff", base=16)) == 255
    with pytest.raises(ZeroDivisionError):
        asyncio.run(workers.run("acme", divmod, 7, 0))


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no priority of their own elsewhere")
def test_calls_yield_to_other_threads(workers: Workers) -> None:
    def nice() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    assert asyncio.run(workers.run("acme", nice)) > nice()


def test_a_crowd_gets_its_turns_on_few_threads(workers: Workers) -> None:
    async def crowd() -> list[str]:
        names = [workers.run("acme", lambda: threading.current_thread().name) for _ in range(200)]
        return await asyncio.gather(*names)

    names = asyncio.run(crowd())
    assert len(names) == 200
    assert len(set(names)) <= 4
    assert not any("asyncio" in name for name in names)


def test_who_goes_away_before_his_turn_costs_nothing(workers: Workers) -> None:
    made: list[str] = []
    gate = threading.Event()

    async def leave() -> None:
        holders = [asyncio.create_task(workers.run("acme", gate.wait, WAIT_S)) for _ in range(4)]
        await asyncio.sleep(0)
        call = asyncio.create_task(workers.run("acme", made.append, "never"))
        await asyncio.sleep(0)
        call.cancel()
        gate.set()
        assert all(await asyncio.gather(*holders))

    asyncio.run(leave())
    workers.close()
    assert made == []


def test_close_can_be_called_twice(workers: Workers) -> None:
    workers.close()
    workers.close()
