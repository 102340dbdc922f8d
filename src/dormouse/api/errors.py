"""From the error tree to HTTP: one table, looked up by class, in OpenAI's envelope."""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from dormouse.domain import errors

log = logging.getLogger(__name__)

TOO_LARGE = 413


class Status(NamedTuple):
    """How a class of errors looks from outside: HTTP status, OpenAI's `type` and `code`."""

    http: int
    type: str
    code: str | None


_TABLE: dict[type[Exception], Status] = {
    errors.RequestError: Status(400, "invalid_request_error", None),
    errors.ContextLengthExceeded: Status(400, "invalid_request_error", "context_length_exceeded"),
    errors.RequestTooLarge: Status(TOO_LARGE, "invalid_request_error", "request_too_large"),
    errors.ModelNotFound: Status(404, "invalid_request_error", "model_not_found"),
    errors.AgentNotFound: Status(404, "invalid_request_error", "agent_not_found"),
    errors.QueueFull: Status(429, "rate_limit_error", "queue_full"),
    errors.Unavailable: Status(503, "server_error", "unavailable"),
    errors.ShuttingDown: Status(503, "server_error", "shutting_down"),
    errors.DeadlineExceeded: Status(504, "server_error", "deadline_exceeded"),
    errors.ModelOutputInvalid: Status(500, "server_error", "model_output_invalid"),
    errors.EngineDead: Status(500, "server_error", "engine_dead"),
    errors.DormouseError: Status(500, "server_error", None),
}


def status_of(error: Exception) -> Status:
    """The row of the nearest class of `error`."""
    for cls in type(error).__mro__:
        if cls in _TABLE:
            return _TABLE[cls]
    return Status(500, "server_error", None)


def envelope(error: Exception) -> dict[str, Any]:
    """OpenAI's error body for `error`."""
    status = status_of(error)
    param = error.param if isinstance(error, errors.RequestError) else None
    return _body(str(error), status.type, param, status.code)


def response(error: Exception) -> JSONResponse:
    """The HTTP answer for `error`, with `Retry-After` where trying again makes sense."""
    headers = {}
    if isinstance(error, errors.Unavailable):
        headers["retry-after"] = str(error.retry_after_s)
    return JSONResponse(envelope(error), status_of(error).http, headers)


def install(app: FastAPI) -> None:
    """Answer every error of the routes in the envelope."""

    @app.exception_handler(errors.DormouseError)
    async def _ours(_: Request, error: errors.DormouseError) -> JSONResponse:
        return response(error)

    @app.exception_handler(RequestValidationError)
    async def _invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            message = f"the body is not valid JSON, at byte {first['loc'][-1]}"
            return JSONResponse(_body(message, "invalid_request_error", None, None), 400)
        if first["loc"] == ("body",):
            message = f"{first['msg']}: send a JSON object with the header content-type: application/json"
            return JSONResponse(_body(message, "invalid_request_error", None, None), 400)
        # The location starts with "body"; what follows is the path of the field.
        param = ".".join(str(part) for part in first["loc"][1:]) or None
        message = f"{param}: {first['msg']}" if param else str(first["msg"])
        return JSONResponse(_body(message, "invalid_request_error", param, None), 400)

    @app.exception_handler(HTTPException)
    async def _http(_: Request, error: HTTPException) -> JSONResponse:
        code = "request_too_large" if error.status_code == TOO_LARGE else None
        body = _body(str(error.detail), "invalid_request_error", None, code)
        return JSONResponse(body, error.status_code, dict(error.headers or {}))

    @app.exception_handler(Exception)
    async def _unexpected(request: Request, error: Exception) -> JSONResponse:
        log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return JSONResponse(_body("internal error; see the server's log", "server_error", None, None), 500)


def _body(message: str, type: str, param: str | None, code: str | None) -> dict[str, Any]:
    # A message may quote what was sent, and JSON can carry halves of characters that UTF-8 cannot.
    message = message.encode("utf-8", "replace").decode("utf-8")
    return {"error": {"message": message, "type": type, "param": param, "code": code}}
