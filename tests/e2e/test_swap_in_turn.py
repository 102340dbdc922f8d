"""Swaps where memory holds one model only: the real runtime is unloaded before the next one is loaded."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from benchmarks.twin import make_twin
from tests.engine.harness import Client

from dormouse.domain.errors import SwapFailed
from dormouse.domain.requests import Finished, SamplingParams
from dormouse.models.folder import ModelFolder
from dormouse.models.host import ModelHost
from dormouse.models.loader import Candidate
from dormouse.models.served import ServedModel
from dormouse.models.stack import FolderLoader
from dormouse.settings import Settings
from dormouse.store.block_store import BlockStore

pytestmark = pytest.mark.timeout(300)

TWIN = "twin"
PROMPT = "It was a bright cold day in April, and the clocks were striking thirteen. " * 12


class NarrowLoader(FolderLoader):
    """Sees no free memory but what unloading gives back. With `loses_files` a model's weights vanish after it
    was checked."""

    loses_files = False

    def free_nbytes(self) -> int:
        return 0

    def held_nbytes(self, served: ServedModel) -> int:
        return super().held_nbytes(served) + (1 << 40)

    def load(self, candidate: Candidate) -> ServedModel:
        if self.loses_files and candidate.folder.name == TWIN:
            for file in candidate.folder.weights:
                file.unlink()
        return super().load(candidate)


@pytest.fixture
def loader(tmp_path: Path, smollm2: ModelFolder) -> Iterator[NarrowLoader]:
    models = tmp_path / "models"
    make_twin(smollm2, models / TWIN)
    (models / smollm2.name).symlink_to(smollm2.path)
    settings = Settings(models_dir=models, data_dir=tmp_path / "data", arena_tokens=4096)
    with BlockStore.open(settings.data_dir, quota_nbytes=1 << 30) as store:
        yield NarrowLoader(settings, store)


async def say(host: ModelHost) -> Finished:
    """A reply of an agent, by whatever is served."""
    served = host.served
    prompt = served.chat.encode(PROMPT)
    call = Client(served.engine).submit(prompt, SamplingParams(temperature=0, max_tokens=8), agent="ada")
    return await asyncio.to_thread(call.finished)


@pytest.mark.parametrize("loses_files", [False, True])
def test_the_agent_continues_after_the_swap_or_its_failure(loader: NarrowLoader, loses_files: bool) -> None:
    async def test() -> None:
        host = ModelHost(None, loader)
        await host.start("smollm2")
        try:
            first = await say(host)
            runtime = host.served.engine.runtime
            loader.loses_files = loses_files
            if loses_files:
                with pytest.raises(SwapFailed, match="'smollm2' is served again"):
                    await host.swap(TWIN, 10.0)
            else:
                assert not (await host.swap(TWIN, 10.0)).beside
                assert (await say(host)).usage.cached_tokens == 0
                await host.swap("smollm2", 10.0)
            assert host.served.engine.runtime is not runtime
            again = await say(host)
            assert again.tokens == first.tokens
            assert again.usage.disk_tokens == again.usage.prompt_tokens - 1
        finally:
            await asyncio.to_thread(host.stop, 0.0)
            host.close()

    asyncio.run(test())
