"""One model takes the place of another: beside it where memory allows, else after it.

Whatever fails, the old model serves afterwards, with its agents: they are named by content, so the ones of a
model that was unloaded and loaded again wake where they were.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any, Protocol

from dormouse.domain.errors import ModelError, ModelSwapped, ShuttingDown, SwapFailed, SwapRefused
from dormouse.models.change import Change, Phase
from dormouse.models.loader import Candidate, Loader
from dormouse.models.progress import Progress
from dormouse.models.served import ServedModel

log = logging.getLogger(__name__)

_MB = 1_000_000


class Stage(Protocol):
    """Where models come and go: what a swap needs of the stage. Of the event loop."""

    @property
    def served(self) -> ServedModel:
        """The model that answers, or did before `shut`."""

    @property
    def is_serving(self) -> bool:
        """Whether requests reach it at once."""

    @property
    def is_closing(self) -> bool:
        """Whether the server is ending."""

    def put(self, served: ServedModel) -> set[asyncio.Task[Any]]:
        """Serve this one from now on; returns the tasks that hold the one before. Raises ShuttingDown."""

    def shut(self) -> set[asyncio.Task[Any]]:
        """Requests wait from now on; returns the tasks that hold the model."""

    def has_left(self) -> None:
        """The model before this one is gone."""


async def load_first(stage: Stage, loader: Loader, change: Change, on_progress: Progress) -> None:
    """Serve the first model. Raises what finding and loading it raises."""
    candidate = await asyncio.to_thread(loader.find, change.target, on_progress)
    change.target = candidate.folder.name
    change.turn(Phase.LOADING)
    await _put(stage, loader, await asyncio.to_thread(loader.load, candidate))


async def replace(stage: Stage, loader: Loader, change: Change, reference: str, drain_s: float) -> None:
    """Serve the model that `reference` means instead of the present one. Raises as `ModelHost.swap` does."""
    old = stage.served
    candidate = await _check(loader, change, reference, old)
    if stage.is_serving and old.folder is not None and candidate.folder.path == old.folder.path:
        return
    change.beside = stage.is_serving and candidate.needed_nbytes <= loader.free_nbytes()
    if change.beside:
        await _beside(stage, loader, change, candidate, old, drain_s)
    else:
        await _in_turn(stage, loader, change, candidate, old, drain_s)


async def _check(loader: Loader, change: Change, reference: str, old: ServedModel) -> Candidate:
    """All that can be known before anything is touched."""
    try:
        candidate = await asyncio.to_thread(loader.find, reference, change.on_progress)
    except (ModelError, OSError) as error:
        raise SwapRefused(f"'{reference}' cannot be served: {error}", param="model") from error
    change.target = candidate.folder.name
    needed, free, held = candidate.needed_nbytes, loader.free_nbytes(), loader.held_nbytes(old)
    if needed > free + held:
        raise SwapRefused(
            f"'{change.target}' needs about {needed / _MB:.0f} MB of memory; {free / _MB:.0f} MB are free "
            f"and unloading '{old.name}' gives back {held / _MB:.0f} MB. Free memory, or start with fewer "
            "--arena-tokens",
            param="model",
        )
    return candidate


async def _beside(
    stage: Stage, loader: Loader, change: Change, candidate: Candidate, old: ServedModel, drain_s: float
) -> None:
    """Load, switch, then let the old one end: no request waits."""
    change.turn(Phase.LOADING)
    try:
        new = await asyncio.to_thread(loader.load, candidate)
    except Exception as error:
        log.exception("'%s' could not be loaded", change.target)
        raise SwapFailed(
            f"'{change.target}' could not be loaded ({_said(error)}); '{old.name}' goes on"
        ) from error
    holders = await _put(stage, loader, new)
    change.turn(Phase.DRAINING)
    await _drain(change, old, holders, drain_s)
    change.turn(Phase.UNLOADING)
    await asyncio.to_thread(loader.unload, old)
    stage.has_left()


async def _in_turn(
    stage: Stage, loader: Loader, change: Change, candidate: Candidate, old: ServedModel, drain_s: float
) -> None:
    """Let the old one end, unload it, load the new one; requests wait in the stage."""
    change.turn(Phase.DRAINING)
    await _drain(change, old, stage.shut(), drain_s)
    try:
        change.turn(Phase.UNLOADING)
        await asyncio.to_thread(loader.unload, old)
        if stage.is_closing:
            raise ShuttingDown("the server is shutting down")
        change.turn(Phase.LOADING)
        await _put(stage, loader, await asyncio.to_thread(loader.load, candidate))
        stage.has_left()
        return
    except ShuttingDown:
        raise
    except Exception as error:
        log.exception("'%s' could not be loaded; bringing '%s' back", change.target, old.name)
        why = _said(error)
    # Outside of the handler: what the failed load has made hangs on its traceback.
    change.turn(Phase.RESTORING)
    await _restore(stage, loader, change, old, why)
    raise SwapFailed(f"'{change.target}' could not be loaded ({why}); '{old.name}' is served again")


async def _restore(stage: Stage, loader: Loader, change: Change, old: ServedModel, why: str) -> None:
    assert old.folder is not None, "a model without files is never unloaded for another"
    try:
        await asyncio.to_thread(loader.unload, old)  # once more, for what the failed load has left
        back = await asyncio.to_thread(loader.load, Candidate(old.folder, old.chat, 0))
    except Exception as error:
        log.exception("'%s' could not be loaded again", old.name)
        change.is_lost = True
        raise SwapFailed(
            f"'{change.target}' could not be loaded ({why}), and neither could '{old.name}' again "
            f"({_said(error)}); no model is served. Swap to one, or restart the server"
        ) from error
    await _put(stage, loader, back)
    stage.has_left()


async def _put(stage: Stage, loader: Loader, new: ServedModel) -> set[asyncio.Task[Any]]:
    """Serve `new`; a server that shuts down meanwhile has no use for it."""
    try:
        return stage.put(new)
    except ShuttingDown:
        await asyncio.to_thread(new.engine.stop, 0.0)
        await asyncio.to_thread(loader.unload, new)
        raise


async def _drain(change: Change, old: ServedModel, holders: set[asyncio.Task[Any]], drain_s: float) -> None:
    """Wait for those who hold the old model, then end its engine; who still runs is saved and told."""
    loop = asyncio.get_running_loop()
    until = loop.time() + drain_s
    if holders:
        await asyncio.wait(holders, timeout=drain_s)
    why = ModelSwapped(
        f"'{old.name}' makes room for '{change.target}'; what was generated is saved. Ask again when "
        f"'{old.name}' is served: it goes on from there"
    )
    await asyncio.to_thread(old.engine.stop, max(0.0, until - loop.time()), why)
    change.num_cut = old.engine.num_cut


def _said(error: Exception) -> str:
    return str(error) or type(error).__name__
