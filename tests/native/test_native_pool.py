"""The threads of the kernels: whoever calls gets the same bits, whether workers come to help or not."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from tests.native.oracle import _native
from torch.utils.dlpack import to_dlpack  # type: ignore[attr-defined]

THREADS = 4
"""More than this machine may have cores: some of them come late, or never."""


@pytest.fixture
def multiply() -> Callable[[int], torch.Tensor]:
    rng = np.random.default_rng(0)
    weight = torch.from_numpy(rng.standard_normal((320, 256), dtype=np.float32))
    x = torch.from_numpy(rng.standard_normal((8, 256), dtype=np.float32))
    packed = torch.empty(_native.packed_nbytes(320, 256, 8), dtype=torch.uint8)
    _native.pack_weight(to_dlpack(weight), 8, to_dlpack(packed), THREADS)

    def multiply(threads: int) -> torch.Tensor:
        out = torch.full((8, 320), torch.nan)
        _native.linear(to_dlpack(x), to_dlpack(packed), 8, None, to_dlpack(out), threads)
        return out

    return multiply


def test_every_task_runs_once_a_thousand_times(multiply: Callable[[int], torch.Tensor]) -> None:
    alone = multiply(1)
    assert not alone.isnan().any()
    for _ in range(1000):
        assert torch.equal(multiply(THREADS), alone)


def test_callers_at_once_do_not_meet(multiply: Callable[[int], torch.Tensor]) -> None:
    alone = multiply(1)
    start = threading.Barrier(3)
    wrong: list[int] = []

    def call(caller: int) -> None:
        start.wait(10)
        wrong.extend(caller for _ in range(300) if not torch.equal(multiply(THREADS), alone))

    callers = [threading.Thread(target=call, args=(caller,)) for caller in range(3)]
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join(60)
    assert not wrong
    assert not any(thread.is_alive() for thread in callers)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_child_has_no_workers_and_computes(multiply: Callable[[int], torch.Tensor]) -> None:
    """The workers stay with the parent. A caller who waited for them would wait for good."""
    alone = multiply(THREADS)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # Python warns of forks beside threads: that is the test
        child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(multiply(THREADS), alone) else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
