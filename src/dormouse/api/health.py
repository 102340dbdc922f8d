"""Whether the server serves, and what keeps it from serving well."""

from __future__ import annotations

import dataclasses
import math
import resource
from dataclasses import dataclass, field
from typing import Any

import psutil
from fastapi import APIRouter
from fastapi.responses import JSONResponse

from dormouse.api.caller import Caller, CallerParam
from dormouse.api.services import Services
from dormouse.engine.engine import Engine
from dormouse.models.change import Change
from dormouse.models.host import ModelHost
from dormouse.store.block_store import BlockStore

_NEARLY_FULL = 0.9
_STALLED_S = 60.0
"""A step of a large model takes seconds; one that takes this long is not coming back soon."""

_WRITE_STALLED_S = 60.0
_DISK_FLOOR_NBYTES = 1 << 30


@dataclass
class Diagnosis:
    """`status`: ok, degraded, starting, draining or dead; requests are answered in the first two. `is_ready`
    also says that they are answered now, and do not wait for a model."""

    status: str = "ok"
    is_ready: bool = True
    reasons: list[dict[str, str]] = field(default_factory=list)

    def add(self, code: str, message: str) -> None:
        """A reason why all is not well; `code` is stable."""
        self.reasons.append({"code": code, "message": message})


def diagnose(services: Services) -> Diagnosis:
    """What there is to complain about. Cheap, from any thread."""
    host, store = services.host, services.store
    found = Diagnosis()
    for reason in store.health():
        found.add(reason.code, reason.text)
    _look_at_disk(store, found)
    _look_at_descriptors(found)
    _look_at_prompts(services, found)
    if host.has_started:
        _look_at(host.served.engine, found)
    if host.change is not None and not host.change.has_ended:
        found.add("swapping" if host.has_started else "loading", _say(host.change))
    if found.reasons:
        found.status = "degraded"
    found.is_ready = found.is_ready and host.is_serving
    if not host.has_started:
        found.status = "starting"
    elif host.is_closing or (host.is_serving and host.served.engine.is_stopping):
        found.status, found.is_ready = "draining", False
    if (death := _death(host)) is not None:
        found.status, found.is_ready = "dead", False
        found.add(*death)
    return found


def router(services: Services) -> APIRouter:
    """`/health` for people and tools, and a yes or no for probes below it."""
    routes = APIRouter(prefix="/health")
    host = services.host

    @routes.get("")
    async def health(caller: CallerParam) -> JSONResponse:
        """Status, reasons and counts: 200 while requests are answered, `degraded` included.

        Without an admin key, where keys are in use, only what probes need.
        """
        found = diagnose(services)
        body: dict[str, Any] = {"status": found.status, "ready": found.is_ready}
        body["reasons"] = _told(found, caller)
        if host.has_started and caller.is_admin:
            served = host.served
            stats, runtime = served.engine.stats(), served.engine.runtime
            body |= {
                "model": served.name,
                "runtime": runtime.name,
                "encrypted": services.store.is_encrypted,
                "engine": dataclasses.asdict(stats),
                "memory": {
                    "weights_nbytes": runtime.weights_nbytes,
                    "arena_nbytes": stats.pages_total * runtime.cache.block_nbytes,
                    "working_nbytes": runtime.working_nbytes,
                },
            }
        return JSONResponse(body, 200 if found.status in ("ok", "degraded") else 503)

    @routes.get("/live")
    async def live(caller: CallerParam) -> JSONResponse:
        """503 when only a restart helps."""
        found = diagnose(services)
        return _probe(found, found.status != "dead", caller)

    @routes.get("/ready")
    async def ready(caller: CallerParam) -> JSONResponse:
        """503 while requests are refused or would wait for a model."""
        found = diagnose(services)
        return _probe(found, found.is_ready, caller)

    @routes.get("/startup")
    async def startup(caller: CallerParam) -> JSONResponse:
        """503 until the first model is loaded; the reasons say what is being done."""
        return _probe(diagnose(services), host.has_started, caller)

    return routes


def _probe(found: Diagnosis, is_good: bool, caller: Caller) -> JSONResponse:
    body = {"status": found.status, "reasons": _told(found, caller)}
    return JSONResponse(body, 200 if is_good else 503)


def _told(found: Diagnosis, caller: Caller) -> list[dict[str, str]]:
    """The reasons; their words name folders and models, which is for admins alone."""
    if caller.is_admin:
        return found.reasons
    return [{"code": reason["code"]} for reason in found.reasons]


def _look_at_disk(store: BlockStore, found: Diagnosis) -> None:
    try:
        disk = store.look_at_disk()
    except OSError as error:
        found.add("disk_gone", f"the data folder cannot be looked at ({error}); bring it back")
        return
    if disk is None:
        found.add("disk_stalled", "the disk of the data folder does not answer; check it, or the network")
    elif not disk.is_in_place:
        found.add(
            "disk_gone", "the data folder is not the one that was opened; bring that one back, or restart"
        )
    if (write_s := store.write_s) > _WRITE_STALLED_S:
        found.add("write_stalled", f"a write to the data folder has taken {write_s:.0f} s; check the disk")
    if disk is not None and disk.free_nbytes < _DISK_FLOOR_NBYTES:
        found.add("disk_low", f"{disk.free_nbytes} bytes are free on the disk of the data folder; free some")


def _look_at_descriptors(found: Diagnosis) -> None:
    num_open, limit = _num_descriptors()
    if num_open is None or num_open > _NEARLY_FULL * limit:
        found.add(
            "descriptors_low",
            f"over {_NEARLY_FULL:.0%} of {limit:g} possible files and connections are open; raise the limit "
            "(ulimit -n)",
        )


def _num_descriptors() -> tuple[int | None, float]:
    """How many are open, None when there is not one left to look, and how many may be."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        num_open = psutil.Process().num_fds()
    except (OSError, psutil.Error):
        return None, limit
    return num_open, math.inf if limit == resource.RLIM_INFINITY else limit


def _look_at_prompts(services: Services, found: Diagnosis) -> None:
    for workers, code, what in (
        (services.prompts, "prompts_stalled", "prompts"),
        (services.grammars, "grammars_stalled", "grammars"),
    ):
        if workers.num_stuck:
            found.add(code, f"{workers.num_stuck} {what} were given up and are still being made")


def _look_at(engine: Engine, found: Diagnosis) -> None:
    stats = engine.stats()
    if stats.pages_used > _NEARLY_FULL * stats.pages_total:
        found.add("arena_full", "over 90% of the arena is in use; give it more --arena-tokens")
    if engine.num_open > _NEARLY_FULL * engine.max_open:
        found.add("queue_nearly_full", f"{engine.num_open} of {engine.max_open} possible requests are open")
    if stats.failed_in_a_row:
        found.add(
            "steps_failing",
            f"the last {stats.failed_in_a_row} requests could not be computed; see the server's log",
        )
    if stats.num_overdue:
        found.add("read_stalled", f"{stats.num_overdue} reads of blocks do not return; check the disk")
    if (busy_s := engine.busy_s) > _STALLED_S:
        found.add("engine_stalled", f"the engine has been at one step for {busy_s:.0f} s")
        found.is_ready = False


def _death(host: ModelHost) -> tuple[str, str] | None:
    """Why no request will ever be answered, unless something is done."""
    if not host.has_started:
        return None
    if (death := host.served.engine.death) is not None:
        return "engine_dead", str(death)
    if (busy_s := host.served.engine.busy_s) > host.served.deadline_s:
        # Whoever was open when the step began has got his error by now.
        return "engine_hung", f"the engine has been at one step for {busy_s:.0f} s; restart the server"
    change = host.change
    if not host.is_serving and not host.is_closing and change is not None and change.has_ended:
        return "no_model", str(change.error)
    return None


def _say(change: Change) -> str:
    """What is being done, for people."""
    text = f"{change.phase.value} '{change.target}' for {change.seconds:.1f} s"
    if change.progress is None:
        return text
    what, done, total = change.progress
    return f"{text}; {what}: {done} of {total} bytes"
