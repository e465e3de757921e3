"""All routes reply errors in OpenAI's form, {"error": {"message", "type", "param", "code"}}. A 5xx hides internals."""

from __future__ import annotations

import errno
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from complete_fn.errors import CompleteError, RateLimitError, StorageError, TooLargeError, UnknownParameterError
from complete_fn.interrupts import Abandoned
from complete_fn.logs import for_tenant, log_failure, logger
from complete_fn.server.call_out_replies import refused_at

LOG = logger("server")
RETRY_SECONDS = 5
CLIENT_CLOSED = 499  # nginx's status for a client that left; no client reads this reply
HTTP_CODES = {404: "not_found", 408: "request_timeout"}
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)  # bodies of requests are kept in the system's folder of temporary files
TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def error_body(status: int, message: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def refusal(status: int, message: str, code: str | None = None, param: str | None = None) -> JSONResponse:
    body = error_body(status, message, code, param)
    headers = {"Retry-After": str(RETRY_SECONDS)} if status in (429, 503) else {}
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(body, status, headers)


def told(request: Request, error: Exception) -> tuple[int, str, str]:
    """(status, message, code) of an error. Details for the operator (paths, log tails) stay in the log."""
    where = f"{request.method} {request.url.path}"
    if isinstance(error, OSError) and error.errno in FULL_DISK:
        error = StorageError(f"The request cannot be kept: {error.strerror}.")
    if not isinstance(error, CompleteError):
        log_failure(where, error, "server")
        return 500, "The service failed; its log says where.", "internal_error"
    principal = getattr(request.state, "principal", None)
    message = str(for_tenant(where, error, principal.tenant if principal is not None else ""))
    return error.status, message.splitlines()[0] if error.status >= 500 else message, error.code


async def of_complete_error(request: Request, error: Exception) -> Response:
    if isinstance(error, CompleteError) and error.status < 500:
        own = refused_at(request.url.path, error)
        if own is not None:
            return own
    response = refusal(*told(request, error), error.param if isinstance(error, UnknownParameterError) else None)
    if isinstance(error, RateLimitError):
        response.headers.update(error.headers)
    return response


async def of_validation(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first: dict[str, Any] = dict(error.errors()[0])
    place = ".".join(str(step) for step in first["loc"][1:])
    if first["type"] == "extra_forbidden":
        return refusal(400, f"{place!r} is not supported by this service. Leave it out.", "unsupported_field", place)
    return refusal(400, f"{place or 'The body'}: {first['msg']}.", "invalid_request", place or None)


async def of_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 413:
        return too_large(request.url.path, f"{error.detail}.")
    response = refusal(error.status_code, f"{error.detail}.", HTTP_CODES.get(error.status_code))
    response.headers.update(error.headers or {})
    return response


async def of_half_character(_: Request, error: Exception) -> JSONResponse:
    return refusal(400, "A text has half of a character (a lone surrogate), which cannot be stored.", "invalid_request")


async def of_abandoned(_: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED)


def too_large(path: str, message: str) -> Response:
    return refused_at(path, TooLargeError(message)) or refusal(413, message, "too_large")


def add_refusals(app: FastAPI) -> None:
    app.add_exception_handler(UnicodeEncodeError, of_half_character)
    app.add_exception_handler(CompleteError, of_complete_error)
    app.add_exception_handler(RequestValidationError, of_validation)
    app.add_exception_handler(HTTPException, of_http)
    app.add_exception_handler(Abandoned, of_abandoned)


class Bounds:
    """Refuses bodies above the limits, also without a Content-Length. Replies to exceptions that no route caught."""

    def __init__(self, app: ASGIApp, upload_bytes: int, body_bytes: int) -> None:
        self.app = app
        self.upload_bytes = upload_bytes
        self.body_bytes = body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        # 65,536 bytes more: a multipart body is a little longer than the file in it.
        limit = self.upload_bytes + 65_536 if scope["path"] == "/v1/files" else self.body_bytes
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit() and int(length) > limit:
            await too_large(scope["path"], above(limit))(scope, receive, send)
            return
        started, received = False, 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > limit:
                raise HTTPException(413, above(limit).rstrip("."))
            return message

        async def noted(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self.app(scope, counted, noted)
        except Exception as error:
            why = told(Request(scope), error)
            if started:
                raise ConnectionAbortedError("The response broke off.") from None
            await refusal(*why)(scope, receive, send)


def above(limit: int) -> str:
    return f"The body is larger than this service takes ({limit:,} bytes)."
