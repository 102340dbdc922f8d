from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tests.runtimes.torch.toys import save_toy
from transformers import PreTrainedModel

from dormouse.runtimes.torch.selection import NATIVE_MODULE

Toy = tuple[Path, PreTrainedModel]


@pytest.fixture(autouse=True)
def _reference_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test does not ask for is the plain path, whether or not native kernels are built."""
    monkeypatch.setenv("DORMOUSE_NO_NATIVE", "1")


@pytest.fixture(params=["reference", "native"])
def any_kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the test on the plain path and, where they are built, on native kernels."""
    if request.param == "native":
        if importlib.util.find_spec(NATIVE_MODULE) is None:
            pytest.skip("native kernels are not built")
        monkeypatch.delenv("DORMOUSE_NO_NATIVE")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Toys are too small to share out: on a busy machine threads that wait for each other take seconds."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Toy]:
    """Folder and transformers' model of a toy, made once."""
    made: dict[str, Toy] = {}

    def make(name: str) -> Toy:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            made[name] = (folder, save_toy(name, folder))
        return made[name]

    return make
