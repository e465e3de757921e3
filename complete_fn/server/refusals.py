"""Errors in OpenAI's form for every route: {"error": {"message", "type", "param", "code"}}. No insides in a 5xx."""

from __future__ import annotations

import logging
import traceback
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from complete_fn.errors import CompleteError, EngineError

LOG = logging.getLogger("complete_fn.server")
RETRY_SECONDS = 5
TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def refusal(status: int, message: str, code: str | None = None, param: str | None = None) -> JSONResponse:
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
    headers = {"Retry-After": str(RETRY_SECONDS)} if status in (429, 503) else {}
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(body, status, headers)


async def of_complete_error(request: Request, error: Exception) -> JSONResponse:
    """Our own errors. What concerns the operator (paths, log tails) stays in the log."""
    assert isinstance(error, CompleteError)
    message = str(error)
    if error.status >= 500:
        LOG.error("%s %s: %s", request.method, request.url.path, message.splitlines()[0])
        shown = message.splitlines()[0] if isinstance(error, EngineError) else ""
        message = shown or "The service cannot do this now; its log says why."
    return refusal(error.status, message, error.code)


async def of_validation(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first: dict[str, Any] = dict(error.errors()[0])
    place = ".".join(str(step) for step in first["loc"][1:])
    if first["type"] == "extra_forbidden":
        return refusal(400, f"{place!r} is not supported by this service. Leave it out.", "unsupported_field", place)
    return refusal(400, f"{place or 'The body'}: {first['msg']}.", "invalid_request", place or None)


async def of_http(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return refusal(error.status_code, f"{error.detail}.", {404: "not_found", 413: "too_large"}.get(error.status_code))


async def of_half_character(_: Request, error: Exception) -> JSONResponse:
    return refusal(400, "A text has half of a character (a lone surrogate), which cannot be stored.", "invalid_request")


def add_refusals(app: FastAPI) -> None:
    app.add_exception_handler(UnicodeEncodeError, of_half_character)
    app.add_exception_handler(CompleteError, of_complete_error)
    app.add_exception_handler(RequestValidationError, of_validation)
    app.add_exception_handler(HTTPException, of_http)


class Bounds:
    """Refuses bodies above the limits, also those that do not say their length, and answers what nobody caught.

    An exception's message may quote a prompt, so only its type and place are logged.
    """

    def __init__(self, app: ASGIApp, upload_bytes: int, body_bytes: int) -> None:
        self.app = app
        self.upload_bytes = upload_bytes
        self.body_bytes = body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        # A multipart body is a little longer than the file in it.
        limit = self.upload_bytes + 65_536 if scope["path"] == "/v1/files" else self.body_bytes
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit() and int(length) > limit:
            await refusal(413, above(limit), "too_large")(scope, receive, send)
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
            last = traceback.extract_tb(error.__traceback__)[-1]
            LOG.error(
                "%s %s: %s at %s:%s", scope["method"], scope["path"], type(error).__name__, last.name, last.lineno
            )
            if started:
                raise ConnectionAbortedError("The response broke off.") from None
            await refusal(500, "The service failed; its log says where.", "internal_error")(scope, receive, send)


def above(limit: int) -> str:
    return f"The body is larger than this service takes ({limit:,} bytes)."
