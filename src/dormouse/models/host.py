"""The host: which model answers a request, now and after a swap."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from dataclasses import dataclass, field
from typing import Any

from dormouse.domain.errors import (
    DormouseError,
    InvalidRequest,
    ModelNotFound,
    ShuttingDown,
    SwapFailed,
    SwapInProgress,
    Unavailable,
)
from dormouse.engine.engine import Engine
from dormouse.models.aliases import Aliases
from dormouse.models.change import Change, Changes, Phase
from dormouse.models.folder import ModelFolder
from dormouse.models.loader import Loader
from dormouse.models.progress import Progress, no_progress
from dormouse.models.served import ServedModel
from dormouse.models.swap import load_first, replace
from dormouse.models.swap_counts import SwapCounts
from dormouse.models.waiting import WaitingRoom

log = logging.getLogger(__name__)

_RETRY_S = 5
"""When to ask again for a model that is on its way."""

_CHANGE_END_S = 300.0
"""Loading cannot be interrupted; a stop waits so long for its end."""


@dataclass(frozen=True, slots=True)
class HostOptions:
    """Names that mean whatever is served; whether requests swap models; times in seconds.

    With `auto_swap` a model is served for `stay_s` at least. A request waits `wait_s` for a model at most,
    and at most `max_waiting` requests of a tenant wait (`Places`).
    """

    aliases: Aliases = field(default_factory=Aliases)
    auto_swap: bool = False
    stay_s: float = 30.0
    wait_s: float = 60.0
    max_waiting: int = 256


class ModelHost:
    """Owns what is served. Lives on the event loop; `served`, `describe` and `stop` are for any thread.

    A model that was handed out is held for the task that asked, until that task ends: no engine is closed
    under a request that is still being rendered, and a model that leaves waits for its streams.
    """

    def __init__(
        self,
        served: ServedModel | None = None,
        loader: Loader | None = None,
        options: HostOptions | None = None,
    ) -> None:
        """Without `served`, `start` comes first; without `loader`, it is served for ever."""
        self.options = options or HostOptions()
        self._loader = loader
        self._served = served
        self._leaving: ServedModel | None = None
        self._is_open = served is not None
        self._served_since = time.monotonic()
        self._holders: set[asyncio.Task[Any]] = set()
        self._waiting = WaitingRoom(self.options.max_waiting)
        self._changes = Changes(self._waiting.wake)
        self._turns: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_closing = False

    @property
    def served(self) -> ServedModel:
        """The model that answers right now, or the last that did while models are swapped.

        Raises Unavailable before the first one is loaded.
        """
        if self._served is None:
            raise Unavailable("the model is being loaded; retry in a moment")
        return self._served

    @property
    def leaving(self) -> tuple[Engine, ...]:
        """The engine of a model that was swapped out and still replies, if there is one."""
        return () if self._leaving is None else (self._leaving.engine,)

    @property
    def is_serving(self) -> bool:
        """Whether requests reach a model at once."""
        return self._is_open and not self._is_closing

    @property
    def is_closing(self) -> bool:
        """Whether the server is ending."""
        return self._is_closing

    @property
    def has_started(self) -> bool:
        """Whether a model was served at any time."""
        return self._served is not None

    @property
    def change(self) -> Change | None:
        """The last change of the model, in progress or ended."""
        return self._changes.last

    @property
    def swap_counts(self) -> SwapCounts:
        """How the swaps so far have ended."""
        return self._changes.counts

    async def serve(self, name: str, tenant: str) -> ServedModel:
        """The model that answers a request for `name`, held until the calling task ends.

        While models are swapped, requests wait, those of one tenant in his share of the room. Raises
        ModelNotFound for a name that nothing here answers to, Unavailable when it took too long, QueueFull,
        ShuttingDown.
        """
        loop = self._loop = asyncio.get_running_loop()
        arrived = loop.time()
        until = arrived + self.options.wait_s
        if (served := self._answering(name)) is not None:
            return served
        with self._waiting.place(tenant):
            while (served := self._answering(name)) is None:
                if self.options.auto_swap and (self._turns is None or self._turns.done()):
                    self._turns = loop.create_task(self._take_turns())
                if not await self._waiting.wait(self._target(name), arrived, until):
                    raise self._not_served_yet(name)
            return served

    def model_of(self, name: str) -> str:
        """The model that a request for `name` means at the moment. Raises ModelNotFound, and Unavailable
        before the first one is loaded."""
        return self._target(name) or self.served.name

    async def start(self, reference: str, on_progress: Progress = no_progress) -> None:
        """Load the first model; requests wait for it. Raises ModelNotFound, ModelError, and ShuttingDown."""
        change = Change(None, reference)
        assert self._loader is not None, "a host without a loader has nothing to start"

        def tell(what: str, done: int, total: int) -> None:
            change.on_progress(what, done, total)
            on_progress(what, done, total)

        await self._changes.run(change, load_first(self, self._loader, change, tell))

    async def swap(self, reference: str, drain_s: float) -> Change:
        """Serve another model; returns when the old one has gone. It goes on if the caller is cancelled.

        Requests of the old one have `drain_s` seconds to finish; the rest is saved and answered with
        ModelSwapped. Raises SwapInProgress, ModelNotFound, SwapRefused and InvalidRequest when nothing was
        touched, SwapFailed when the old model had to be brought back, ShuttingDown.
        """
        if self._loader is None:
            raise InvalidRequest("this server has one model only; start it with `dormouse serve`")
        if (last := self.change) is not None and not last.has_ended:
            raise SwapInProgress(f"a swap to '{last.target}' is in progress; retry when it has ended")
        change = Change(self._served.name if self._served else None, reference)
        if self._is_open and reference == change.source:
            change.turn(Phase.DONE)
            return change
        await self._changes.run(change, replace(self, self._loader, change, reference, drain_s))
        return change

    def names(self) -> list[str]:
        """Names that a request may use: the served model, with auto-swap all models of this machine."""
        names = [self._served.name] if self._served is not None else []
        if self.options.auto_swap:
            names += [folder.name for folder in self.models() if folder.name not in names]
        return names

    def models(self) -> list[ModelFolder]:
        """The models of this machine. Reads the disk."""
        return [] if self._loader is None else self._loader.models()

    def describe(self) -> dict[str, Any]:
        """For the admin routes."""
        return {
            "serving": self.is_serving,
            "model": self._served.name if self._served else None,
            "served_s": round(time.monotonic() - self._served_since, 1) if self._served else None,
            "aliases": list(self.options.aliases.patterns),
            "auto_swap": self.options.auto_swap,
            "waiting": self._waiting.counts,
            "held": len(self._holders),
            "swaps": {outcome.value: count for outcome, count in self.swap_counts.by_outcome().items()},
            "change": self.change.describe() if self.change else None,
        }

    def stop(self, grace_s: float) -> None:
        """Refuse new requests, let running ones finish within `grace_s` seconds, then save and fail the rest.

        Blocks until the engine has ended and no model is being loaded any more. Another call with a shorter
        grace cuts the first one short.
        """
        self._is_closing = True
        if self._loop is not None:
            # A loop that has ended has nobody to wake.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._release_all)
        until = time.monotonic() + grace_s
        for served in (self._served, self._leaving):
            if served is not None:
                served.engine.stop(max(0.0, until - time.monotonic()))
        if not self._changes.wait_for_end(_CHANGE_END_S):
            log.error("a model is still being loaded after %g s; it is left behind", _CHANGE_END_S)
        if self._served is not None:
            self._served.engine.stop(0.0)

    def close(self) -> None:
        """Free the model, after `stop`."""
        if self._loader is not None and self._served is not None:
            self._loader.unload(self._served)

    # -- for a change in progress ----------------------------------------------------------------

    def put(self, served: ServedModel) -> set[asyncio.Task[Any]]:
        """See `Stage`."""
        if self._is_closing:
            raise ShuttingDown("the server is shutting down")
        self._leaving, self._served = self._served, served
        self._served_since = time.monotonic()
        self._is_open = True
        self._waiting.wake()
        return self._take_holders()

    def shut(self) -> set[asyncio.Task[Any]]:
        """See `Stage`."""
        self._is_open = False
        return self._take_holders()

    def has_left(self) -> None:
        """See `Stage`."""
        self._leaving = None

    # -- inside ----------------------------------------------------------------------------------

    def _target(self, name: str) -> str | None:
        """The model that `name` means, None for whatever is served. Raises ModelNotFound."""
        current, change = self._served, self.change
        if current is None:
            return None  # what the first one is called turns out when it is there
        if name == current.name:
            return name
        is_coming = change is not None and not change.has_ended and name == change.target
        if is_coming or (self._knows(name) and self.options.auto_swap):
            return name
        if self._knows(name):
            raise ModelNotFound(
                f"model '{name}' is on this machine but not served; this server has '{current.name}'. "
                f"Swap with `dormouse models swap {name}`, or serve with --auto-swap on",
                param="model",
            )
        if self.options.aliases.match(name):
            return None
        raise ModelNotFound(
            f"model '{name}' is not served here; this server has '{current.name}'", param="model"
        )

    def _knows(self, name: str) -> bool:
        return self._loader is not None and self._loader.knows(name)

    def _answering(self, name: str) -> ServedModel | None:
        """The model that answers a request for `name`, held; None while there is hope of one.

        Raises ShuttingDown, ModelNotFound, and Unavailable when nothing is on its way.
        """
        if self._is_closing:
            raise ShuttingDown("the server is shutting down; retry when it is back")
        target = self._target(name)
        if self._is_open and self._served is not None and target in (None, self._served.name):
            return self._hold(self._served)
        if not self._changes.is_running and not self.options.auto_swap:
            raise self._nothing_served()
        return None

    def _not_served_yet(self, name: str) -> DormouseError:
        return Unavailable(
            f"'{name}' was not served within {self.options.wait_s:g} s; retry later",
            retry_after_s=max(1, round(self.options.stay_s)) if self.options.auto_swap else _RETRY_S,
        )

    def _hold(self, served: ServedModel) -> ServedModel:
        task = asyncio.current_task()
        assert task is not None
        if task not in self._holders:
            self._holders.add(task)
            task.add_done_callback(self._holders.discard)
        return served

    def _take_holders(self) -> set[asyncio.Task[Any]]:
        holders, self._holders = self._holders, set()
        return holders

    def _nothing_served(self) -> DormouseError:
        why = self.change.error if self.change is not None else None
        return Unavailable(f"no model is served ({why}); swap to one, or restart the server")

    async def _take_turns(self) -> None:
        """Serve what is waited for, the longest first, each for its stay at least."""
        while not self._is_closing:
            await self._changes.end()
            current = self._served.name if self._served is not None and self._is_open else None
            if (target := self._waiting.longest_awaited(current)) is None:
                return
            left = self._served_since + self.options.stay_s - time.monotonic()
            if current is not None and left > 0:
                await asyncio.sleep(left)
                continue
            try:
                # Nobody is cut for another's sake: who runs has the time that every request has.
                await self.swap(target, self.served.deadline_s)
            except SwapInProgress:
                continue
            except DormouseError as error:
                self._waiting.refuse(target, error)
            except Exception as error:
                log.exception("'%s' could not be swapped in", target)
                self._waiting.refuse(target, SwapFailed(f"'{target}' could not be swapped in: {error!r}"))

    def _release_all(self) -> None:
        self._waiting.wake()
        if self._turns is not None:
            self._turns.cancel()
