"""Who sends a request: the tenant whose agents and blocks it sees, and whether it may administer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from dormouse.domain.agents import DEFAULT_TENANT


@dataclass(frozen=True, slots=True)
class Caller:
    """`key` is the id of the API key, None where no keys are in use."""

    tenant: str = DEFAULT_TENANT
    key: str | None = None
    is_admin: bool = True


async def caller_of(request: Request) -> Caller:
    """The caller as the key check found it; without keys everybody is the default tenant.

    Async, although it waits for nothing: for a plain function FastAPI goes to a thread, of up to 40.
    """
    found = getattr(request.state, "caller", None)
    return found if isinstance(found, Caller) else Caller()


CallerParam = Annotated[Caller, Depends(caller_of)]
"""A route's parameter."""
