"""`serve_app` serves an application so that clients who are many, or slow, cannot take all of its connections.

uvicorn has no time limit for headers and bodies: its `timeout_keep_alive` ends with the first byte of a request. Its
`limit_concurrency` counts half-sent requests too, so that it would refuse everybody. Other ASGI servers have the time
limit, but no bound by address. So the bounds are ours, on interfaces that asyncio, uvicorn and ASGI document: an event
loop whose `create_server` wraps each connection's protocol, `uvicorn.Server.serve(sockets=...)`, and a middleware.
"""

from __future__ import annotations

import asyncio
import contextvars
import ipaddress
import json
import socket
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import uvicorn
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from complete_fn.logs import logger
from complete_fn.server.error_replies import RETRY_SECONDS, error_body

LOG = logger("server")
MOST, FEWEST = 4096, 16  # connections
WATCH_SECONDS = 1.0  # between two looks whether the server is to end
BACKLOG = 256  # connections that the loop opens at once, before the guard sees the first
HEADER_BYTES = 1 << 16  # warehouses send their context in headers
OTHER_FILES = 512  # open files for all but connections: the store, storage, libraries
GRACE_SECONDS = 2.0  # for the last reply of a connection that is being closed
SLOW_HEADERS = "The request's headers did not arrive within {0:g} s."
SLOW_BODY = "The request's body arrives too slowly: at most {0:g} s without a byte, and {1} bytes a second over all"
WARN_SECONDS = 60.0  # between two warnings
CROWD = "This service has as many connections as it takes, from your address or in all. Try again in a moment."


@dataclass(frozen=True, slots=True)
class ConnectionBounds:
    """What clients may take.

    Attributes:
        most: open connections in all; new ones take the place of those that wait longest without a whole request.
        of_one: open connections of one address, or of one IPv6 network (/64).
        header_seconds: the time for headers, counted from the opening of the connection or from the last reply.
        body_seconds: the longest pause in a body, and the time for a whole body beyond what its bytes are given.
        body_rate: bytes of a body that are given one second.
        reply_seconds: the longest time in which a client reads nothing of a reply.
    """

    most: int = MOST
    of_one: int = MOST * 3 // 4
    header_seconds: float = 10.0
    body_seconds: float = 30.0
    body_rate: int = 500
    reply_seconds: float = 60.0


def bounds_within(files: int, wanted: int | None = None) -> ConnectionBounds:
    """The bounds of a process that may open so many files.

    A connection may need a second file, as a chat does that is passed on to a worker. One address may have three
    quarters of the connections, as a proxy has only one address.
    """
    most = min(wanted or MOST, max(FEWEST, (files - OTHER_FILES) // 2))
    return ConnectionBounds(most, max(1, most * 3 // 4))


def serve_app(
    app: ASGIApp, listener: socket.socket, files: int, wanted: int | None, is_over: Callable[[], bool]
) -> None:
    """Serve until a signal comes or `is_over`, in a process that may open so many files.

    Args:
        wanted: The most connections; None takes as many as the files allow.
    """
    run_server(make_server(app), listener, bounds_within(files, wanted), is_over)


def run_server(
    server: uvicorn.Server,
    listener: socket.socket,
    bounds: ConnectionBounds,
    is_over: Callable[[], bool] = lambda: False,
) -> None:
    """Run a server until it is told to end, or `is_over`."""

    async def watch() -> None:
        while not is_over():
            await asyncio.sleep(WATCH_SECONDS)
        server.should_exit = True

    async def serve() -> None:
        watching = asyncio.create_task(watch())
        try:
            await server.serve(sockets=[listener])
        finally:
            watching.cancel()

    with asyncio.Runner(loop_factory=lambda: GuardedLoop(ConnectionGuard(bounds))) as runner:
        runner.run(serve())


def make_server(app: ASGIApp, graceful_seconds: int = 10) -> uvicorn.Server:
    """A server for `run_server`. It reads with h11, which bounds the bytes of headers."""
    config = uvicorn.Config(
        app,
        http="h11",
        h11_max_incomplete_event_size=HEADER_BYTES,
        ws="none",  # no route has any
        backlog=BACKLOG,
        timeout_graceful_shutdown=graceful_seconds,
        log_level="warning",
        access_log=False,
    )
    return uvicorn.Server(config)


class GuardedLoop(asyncio.SelectorEventLoop):
    """An event loop whose servers are guarded."""

    def __init__(self, guard: ConnectionGuard) -> None:
        super().__init__()
        self.guard = guard

    async def create_server(
        self, protocol_factory: Callable[[], asyncio.BaseProtocol], *arguments: Any, **named: Any
    ) -> asyncio.Server:
        def guarded() -> GuardedConnection:
            return GuardedConnection(self.guard, cast(asyncio.Protocol, protocol_factory()))

        return await super().create_server(guarded, *arguments, **named)


class ConnectionGuard:
    """The open connections of one event loop.

    Attributes:
        opened: the connections that are open, by address.
        waiting: the connections without a whole request, the longest waiting first, with the time of their end.
    """

    def __init__(self, bounds: ConnectionBounds) -> None:
        self.bounds = bounds
        self.opened: Counter[str] = Counter()
        self.waiting: dict[GuardedConnection, float] = {}
        self.timer: asyncio.TimerHandle | None = None
        self.warned_at = -WARN_SECONDS

    def admit(self, connection: GuardedConnection) -> bool:
        """Count the connection. Returns whether there is room for it, or a waiting connection made room."""
        address = connection.address
        is_there_room = (self.opened[address] < self.bounds.of_one or self.make_room(address)) and (
            self.opened.total() < self.bounds.most or self.make_room(None)
        )
        if is_there_room:
            self.opened[address] += 1
            self.wait(connection)
        return is_there_room

    def make_room(self, address: str | None) -> bool:
        """Close the connection, of this address or of any, that has waited longest; whether there is one."""
        self.warn(address)
        chosen = next((each for each in self.waiting if address in (None, each.address)), None)
        if chosen is not None:
            chosen.transport.abort()
            self.forget(chosen)
        return chosen is not None

    def warn(self, address: str | None) -> None:
        now = time.monotonic()
        if now - self.warned_at >= WARN_SECONDS:
            self.warned_at = now
            who = "Clients have" if address is None else f"{address} has"
            LOG.warning("%s as many connections open as are allowed (%s).", who, self.opened.total())

    def wait(self, connection: GuardedConnection) -> None:
        """The connection's next request is awaited from now on."""
        loop = asyncio.get_running_loop()
        self.waiting[connection] = loop.time() + self.bounds.header_seconds
        if self.timer is None:
            self.timer = loop.call_later(self.bounds.header_seconds, self.close_late)

    def close_late(self) -> None:
        """Close the connections whose time has passed."""
        loop = asyncio.get_running_loop()
        self.timer = None
        now = loop.time()
        for connection, until in list(self.waiting.items()):
            if until > now:
                self.timer = loop.call_at(until, self.close_late)
                break
            del self.waiting[connection]
            connection.close_late()

    def forget(self, connection: GuardedConnection) -> None:
        self.waiting.pop(connection, None)
        if connection.admitted:
            connection.admitted = False
            self.opened[connection.address] -= 1
            if not self.opened[connection.address]:
                del self.opened[connection.address]


class GuardedConnection(asyncio.Protocol):
    """A connection, in front of the protocol that reads its requests.

    Attributes:
        is_known: whether the inner protocol knows of the connection; it learns nothing of one that is refused.
        admitted: whether the guard counts the connection.
        requests: the requests that the application is answering.
        has_begun: whether a byte came since the connection waits.
    """

    transport: asyncio.Transport
    address: str

    def __init__(self, guard: ConnectionGuard, inner: asyncio.Protocol) -> None:
        self.guard, self.inner = guard, inner
        self.is_known = self.admitted = self.has_begun = False
        self.requests = 0
        # A server starts the task of a request when its bytes arrive, so the request finds its connection here.
        self.context = contextvars.copy_context()
        self.context.run(CONNECTION.set, self)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.address = address_of(transport.get_extra_info("peername"))
        send_at_once(transport)
        self.is_known = self.admitted = self.guard.admit(self)
        if self.is_known:
            self.inner.connection_made(transport)
        else:
            self.close_with(503, CROWD, "too_many_connections")

    def data_received(self, data: bytes) -> None:
        if self.admitted:
            self.has_begun = True
            self.context.run(self.inner.data_received, data)

    def eof_received(self) -> bool | None:
        return self.inner.eof_received() if self.is_known else None

    def pause_writing(self) -> None:
        if self.is_known:
            self.inner.pause_writing()

    def resume_writing(self) -> None:
        if self.is_known:
            self.inner.resume_writing()

    def connection_lost(self, error: Exception | None) -> None:
        self.guard.forget(self)
        if self.is_known:
            self.inner.connection_lost(error)

    def begin_request(self) -> None:
        self.requests += 1
        self.guard.waiting.pop(self, None)

    def end_request(self) -> None:
        self.requests -= 1
        if not self.requests and self.admitted:
            self.has_begun = False
            self.guard.wait(self)

    def close_late(self) -> None:
        if self.has_begun:
            self.close_with(408, SLOW_HEADERS.format(self.guard.bounds.header_seconds), "request_timeout")
        else:
            self.close()

    def close_with(self, status: int, message: str, code: str) -> None:
        self.transport.write(raw_reply(status, message, code))
        self.close()

    def close(self) -> None:
        """Close the connection once its last reply is sent, or soon if its client does not read."""
        self.transport.close()
        asyncio.get_running_loop().call_later(GRACE_SECONDS, self.transport.abort)


CONNECTION: contextvars.ContextVar[GuardedConnection | None] = contextvars.ContextVar("connection", default=None)


class ClientPace:
    """Ends requests whose body comes too slowly, and connections whose client does not read its reply."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        connection = CONNECTION.get()
        if scope["type"] != "http" or connection is None:
            await self.app(scope, receive, send)
            return
        loop, bounds = asyncio.get_running_loop(), connection.guard.bounds

        async def sent(message: Message) -> None:
            end = loop.call_later(bounds.reply_seconds, connection.transport.abort)
            try:
                await send(message)
            finally:
                end.cancel()

        connection.begin_request()
        try:
            await self.app(scope, paced(receive, bounds), sent)
        finally:
            connection.end_request()


def paced(receive: Receive, bounds: ConnectionBounds) -> Receive:
    """Receives a body as `receive` does. Only the time is counted in which the application waits for it.

    Raises:
        HTTPException: The body comes too slowly.
    """
    loop = asyncio.get_running_loop()
    waited, received, is_whole = 0.0, 0, False

    async def receive_in_time() -> Message:
        nonlocal waited, received, is_whole
        if is_whole:
            return await receive()
        began = loop.time()
        left = bounds.body_seconds + received / bounds.body_rate - waited
        try:
            async with asyncio.timeout(min(bounds.body_seconds, left)):
                message = await receive()
        except TimeoutError:
            why = SLOW_BODY.format(bounds.body_seconds, bounds.body_rate)
            raise HTTPException(408, why, {"Connection": "close"}) from None
        waited += loop.time() - began
        received += len(message.get("body", b""))
        is_whole = not message.get("more_body", False)
        return message

    return receive_in_time


def send_at_once(transport: asyncio.BaseTransport) -> None:
    """Send each piece of a reply without waiting for the client's acknowledgement of the one before (some 40 ms).

    asyncio does so only where the listening socket was made with the number of its protocol.
    """
    link = transport.get_extra_info("socket")
    if link is not None and link.family in (socket.AF_INET, socket.AF_INET6):
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def raw_reply(status: int, message: str, code: str) -> bytes:
    body = json.dumps(error_body(status, message, code)).encode()
    reason = {408: "Request Timeout", 503: "Service Unavailable"}[status]
    retry = f"Retry-After: {RETRY_SECONDS}\r\n" if status == 503 else ""
    head = f"HTTP/1.1 {status} {reason}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    return f"{head}{retry}Connection: close\r\n\r\n".encode() + body


def address_of(peer: Any) -> str:
    """The client's address, or its IPv6 network: a client has the addresses of a whole network of this size."""
    if not isinstance(peer, tuple):
        return ""
    try:
        found = ipaddress.ip_address(str(peer[0]).partition("%")[0])
    except ValueError:
        return str(peer[0])
    if isinstance(found, ipaddress.IPv4Address):
        return str(found)
    if found.ipv4_mapped is not None:
        return str(found.ipv4_mapped)
    return str(ipaddress.ip_network((found, 64), strict=False))
