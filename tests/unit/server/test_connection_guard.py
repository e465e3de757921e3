"""Whose connection it is, and how many there may be."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from typing import Any

import httpx
import pytest
from starlette.responses import PlainTextResponse
from starlette.routing import Route, Router

from complete_fn.server.connection_guard import (
    CONNECTION,
    MOST,
    ClientPace,
    ConnectionBounds,
    address_of,
    bounds_within,
    make_server,
    run_server,
)


@pytest.mark.parametrize(
    ("peer", "address"),
    [
        (("192.0.2.7", 4000), "192.0.2.7"),
        (("::ffff:192.0.2.7", 4000, 0, 0), "192.0.2.7"),
        (("2001:db8:1:2:3:4:5:6", 4000, 0, 0), "2001:db8:1:2::/64"),
        (("fe80::1%eth0", 4000, 0, 2), "fe80::/64"),
        (("a name", 4000), "a name"),
        ("", ""),
        (None, ""),
    ],
)
def test_an_ipv6_client_counts_by_its_network(peer: object, address: str) -> None:
    assert address_of(peer) == address


@pytest.mark.parametrize(
    ("files", "wanted", "most"),
    [(1 << 16, None, MOST), (1024, None, 256), (1 << 16, 100, 100), (1024, 9000, 256), (8, None, 16)],
)
def test_connections_leave_files_for_all_else(files: int, wanted: int | None, most: int) -> None:
    found = bounds_within(files, wanted)
    assert (found.most, found.of_one) == (most, most * 3 // 4)


async def slow(_: Any) -> PlainTextResponse:
    """Answers after longer than headers may take; says whether its connection sends at once."""
    await asyncio.sleep(0.5)
    connection = CONNECTION.get()
    assert connection is not None
    link = connection.transport.get_extra_info("socket")
    return PlainTextResponse(str(link.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0))


@pytest.mark.parametrize(("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
def test_a_request_knows_its_connection_by_ipv4_and_ipv6(family: int, host: str) -> None:
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.bind((host, 0))
    except OSError:
        pytest.skip(f"this machine has no {host}")
    listener.listen()
    server = make_server(ClientPace(Router([Route("/", slow)])))
    serving = (server, listener, ConnectionBounds(header_seconds=0.2))
    thread = threading.Thread(target=run_server, args=serving, daemon=True)
    port = listener.getsockname()[1]
    thread.start()
    try:
        until = time.monotonic() + 30
        while not server.started and time.monotonic() < until:
            time.sleep(0.01)
        with httpx.Client(base_url=f"http://{f'[{host}]' if ':' in host else host}:{port}") as client:
            assert [client.get("/").text for _ in range(2)] == ["True", "True"]
    finally:
        server.should_exit = True
        thread.join(30)
