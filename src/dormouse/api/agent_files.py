"""Agents as files: export is a download, import an upload, each of any size that the disk quota allows."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from typing import Any, BinaryIO
from urllib.parse import quote

from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse

from dormouse.api.agent_rows import agent_row
from dormouse.api.caller import CallerParam
from dormouse.api.server import BodyCut
from dormouse.domain.errors import StoreError, UploadStalled
from dormouse.models.agents import Agents
from dormouse.models.host import ModelHost
from dormouse.store.agent_export import AgentExport
from dormouse.store.block_store import BlockStore

log = logging.getLogger(__name__)

MEDIA_TYPE = "application/octet-stream"
UPLOAD_IDLE_S = 30.0
"""So long may an upload send nothing: only one is received at a time, and others wait for it."""
_SUFFIX = ".agent.safetensors"


def router(host: ModelHost, store: BlockStore, prefix: str) -> APIRouter:
    """The routes; to be included before those that take any path for a name."""
    routes = APIRouter(prefix=prefix)
    one_at_a_time = asyncio.Semaphore(1)

    @routes.get("/{name:path}/export", response_class=StreamingResponse)
    async def export(name: str, caller: CallerParam) -> StreamingResponse:
        """The agent as one file: history, blocks, checkpoints, documents.

        It is cut, short of its `content-length`, when the agent is deleted meanwhile, or a block of it goes.
        """
        body = await asyncio.to_thread(store.admin.export, caller.tenant, name)
        filename = quote(name + _SUFFIX, safe="")
        headers = {
            "content-length": str(body.nbytes),
            "content-disposition": f"attachment; filename*=UTF-8''{filename}",
        }
        return StreamingResponse(_told(name, body), media_type=MEDIA_TYPE, headers=headers)

    @routes.post("/import", status_code=201)
    async def import_agent(
        request: Request, caller: CallerParam, name: str | None = None, overwrite: bool = False
    ) -> dict[str, Any]:
        """An agent from the file in the body; all of it is verified before anything is written."""
        served = host.served
        # Each upload takes its size of the disk until it is verified.
        async with one_at_a_time:
            with store.scratch() as file:
                nbytes = await _receive(request, file)

                def load() -> dict[str, Any]:
                    agents = Agents(served, store)
                    agent = agents.load(file, nbytes, caller.tenant, name=name, overwrite=overwrite)
                    return agent_row(agent, served, store)

                return await asyncio.to_thread(load)

    return routes


def _told(name: str, body: AgentExport) -> Iterator[bytes]:
    """The file. Raises BodyCut when it cannot be finished."""
    try:
        yield from body
    except (StoreError, OSError) as error:
        log.warning("the export of %r was cut: %s", name, error)
        raise BodyCut from error


async def _receive(request: Request, file: BinaryIO) -> int:
    """Write the body to `file`; its size in bytes. `BodyLimit` bounds it. Raises UploadStalled."""
    now = asyncio.get_running_loop().time
    nbytes = 0
    try:
        async with asyncio.timeout(UPLOAD_IDLE_S) as idle:
            async for chunk in request.stream():
                idle.reschedule(None)  # our disk's time is not the sender's
                await asyncio.to_thread(file.write, chunk)
                nbytes += len(chunk)
                idle.reschedule(now() + UPLOAD_IDLE_S)
    except TimeoutError:
        raise UploadStalled(
            f"nothing came for {UPLOAD_IDLE_S:g} s after {nbytes} bytes; nothing was imported, send it again"
        ) from None
    return nbytes
