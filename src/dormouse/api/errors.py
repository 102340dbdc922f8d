"""From the error tree to HTTP: one table, looked up by class, in the envelope of the path's dialect."""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dormouse.domain import errors

log = logging.getLogger(__name__)

TOO_LARGE = 413
TOO_SLOW = 408

_CODES = {TOO_LARGE: "request_too_large", TOO_SLOW: "upload_stalled"}


class Status(NamedTuple):
    """How a class of errors looks from outside: HTTP status, OpenAI's `type` and `code`; `anthropic` is the
    status where that dialect has one of its own."""

    http: int
    type: str
    code: str | None
    anthropic: int | None = None


_TABLE: dict[type[Exception], Status] = {
    errors.RequestError: Status(400, "invalid_request_error", None),
    errors.ContextLengthExceeded: Status(400, "invalid_request_error", "context_length_exceeded"),
    errors.RequestTooLarge: Status(TOO_LARGE, "invalid_request_error", "request_too_large"),
    errors.ModelNotFound: Status(404, "invalid_request_error", "model_not_found"),
    errors.AgentNotFound: Status(404, "invalid_request_error", "agent_not_found"),
    errors.AgentExists: Status(409, "invalid_request_error", "agent_exists"),
    errors.AgentBusy: Status(409, "invalid_request_error", "agent_busy"),
    errors.CheckpointNotFound: Status(404, "invalid_request_error", "checkpoint_not_found"),
    errors.ArchiveInvalid: Status(400, "invalid_request_error", "archive_invalid"),
    errors.ArchiveMismatch: Status(409, "invalid_request_error", "archive_mismatch"),
    errors.UploadStalled: Status(408, "invalid_request_error", "upload_stalled"),
    errors.DocumentsFull: Status(507, "invalid_request_error", "documents_full"),
    errors.ResponseNotFound: Status(404, "invalid_request_error", "previous_response_not_found"),
    errors.SwapRefused: Status(400, "invalid_request_error", "swap_refused"),
    errors.SwapInProgress: Status(409, "conflict_error", "swap_in_progress"),
    errors.Unauthorized: Status(401, "invalid_request_error", "invalid_api_key"),
    errors.Forbidden: Status(403, "permission_error", "admin_key_needed"),
    errors.AddressRefused: Status(403, "permission_error", "address_refused"),
    errors.QueueFull: Status(429, "rate_limit_error", "queue_full", anthropic=529),
    errors.RateLimited: Status(429, "rate_limit_error", "rate_limit_exceeded"),
    errors.Unavailable: Status(503, "server_error", "unavailable"),
    errors.ShuttingDown: Status(503, "server_error", "shutting_down"),
    errors.ModelSwapped: Status(503, "server_error", "model_swapped"),
    errors.DeadlineExceeded: Status(504, "server_error", "deadline_exceeded"),
    errors.EngineStalled: Status(503, "server_error", "engine_stalled"),
    errors.PromptStalled: Status(503, "server_error", "prompt_stalled"),
    errors.SwapFailed: Status(500, "server_error", "swap_failed"),
    errors.ConstraintBroken: Status(500, "server_error", "constraint_broken"),
    errors.ModelOutputInvalid: Status(500, "server_error", "model_output_invalid"),
    errors.StepFailed: Status(500, "server_error", "step_failed"),
    errors.EngineDead: Status(500, "server_error", "engine_dead"),
    errors.DormouseError: Status(500, "server_error", None),
}


def status_of(error: Exception) -> Status:
    """The row of the nearest class of `error`."""
    for cls in type(error).__mro__:
        if cls in _TABLE:
            return _TABLE[cls]
    return Status(500, "server_error", None)


def speaks_anthropic(path: str) -> bool:
    """Whether the clients of `path` read Anthropic's envelope; all others read OpenAI's."""
    return path == "/v1/messages" or path.startswith("/v1/messages/")


def envelope(error: Exception, path: str = "", request_id: str | None = None) -> dict[str, Any]:
    """The error body for `error` in the dialect of `path`; Anthropic's carries the request's id."""
    status = status_of(error)
    if speaks_anthropic(path):
        return _anthropic_body(str(error), status.anthropic or status.http, request_id)
    param = error.param if isinstance(error, errors.RequestError) else None
    return _body(str(error), status.type, param, status.code)


def response(error: Exception, path: str = "", request_id: str | None = None) -> JSONResponse:
    """The HTTP answer for `error`, with `Retry-After` where trying again makes sense."""
    headers = {}
    if isinstance(error, errors.Unavailable):
        headers["retry-after"] = str(error.retry_after_s)
    if isinstance(error, errors.Unauthorized):
        headers["www-authenticate"] = "Bearer"
    status = status_of(error)
    own = status.anthropic if speaks_anthropic(path) else None
    return JSONResponse(envelope(error, path, request_id), own or status.http, headers)


def install(app: FastAPI) -> None:
    """Answer every error of the routes in the envelope."""

    @app.exception_handler(errors.DormouseError)
    async def _ours(request: Request, error: errors.DormouseError) -> JSONResponse:
        return response(error, request.url.path, request_id_of(request.scope))

    @app.exception_handler(RequestValidationError)
    async def _invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return response(_invalid_request(error), request.url.path, request_id_of(request.scope))

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> JSONResponse:
        code = _CODES.get(error.status_code)
        message = str(error.detail)
        if speaks_anthropic(request.url.path):
            body = _anthropic_body(message, error.status_code, request_id_of(request.scope))
        else:
            body = _body(message, "invalid_request_error", None, code)
        return JSONResponse(body, error.status_code, dict(error.headers or {}))


class Unexpected:
    """ASGI middleware, the innermost: answers what no handler expected with a 500 in the envelope.

    Starlette's own handler for it sits outside of all middleware, where answers get neither request id nor
    CORS headers.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on; an error after the first byte goes on, and cuts the connection."""
        has_started = False

        async def noted(message: Message) -> None:
            nonlocal has_started
            has_started = True
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except Exception as error:
            if has_started or scope["type"] != "http":
                raise
            log.error("%s %s failed", scope["method"], scope["path"], exc_info=error)
            internal = errors.DormouseError("internal error; see the server's log")
            await response(internal, scope["path"], request_id_of(scope))(scope, receive, send)


def request_id_of(scope: Scope) -> str | None:
    """The id of the request, as the middleware has put it into its state."""
    found = scope.get("state", {}).get("request_id")
    return found if isinstance(found, str) else None


_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
    529: "overloaded_error",
}


def _invalid_request(error: RequestValidationError) -> errors.InvalidRequest:
    message, param = _explain(error)
    return errors.InvalidRequest(message, param=param)


def _explain(error: RequestValidationError) -> tuple[str, str | None]:
    """What is wrong with a body, and the path of the field."""
    first = error.errors()[0]
    if first["loc"] == ("body",):
        return f"{first['msg']}: send a JSON object with the header content-type: application/json", None
    # The location starts with "body"; what follows is the path of the field.
    param = ".".join(str(part) for part in first["loc"][1:]) or None
    return (f"{param}: {first['msg']}" if param else str(first["msg"])), param


def _body(message: str, type: str, param: str | None, code: str | None) -> dict[str, Any]:
    return {"error": {"message": _sendable(message), "type": type, "param": param, "code": code}}


def _anthropic_body(message: str, status: int, request_id: str | None) -> dict[str, Any]:
    kind = _ANTHROPIC_TYPES.get(status, "api_error" if status >= 500 else "invalid_request_error")
    error = {"type": kind, "message": _sendable(message)}
    return {"type": "error", "error": error, "request_id": request_id}


def _sendable(message: str) -> str:
    # A message may quote what was sent, and JSON can carry halves of characters that UTF-8 cannot.
    return message.encode("utf-8", "replace").decode("utf-8")
