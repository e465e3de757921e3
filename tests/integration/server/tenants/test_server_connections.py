"""Clients that open many connections, or are slow on them, keep nobody else from being served. They need no key."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from complete_fn.jobs.api_keys import KeyStore
from complete_fn.server.connection_guard import ConnectionBounds
from complete_fn.store.store import Store
from tests.integration.server.conftest import Running
from tests.integration.server.tenants.test_server_neighbours import GatedEngine, until

HALF = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nX-Slow: "
WHOLE = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
HALF_SENT, FILES = 1200, 1024  # connections; files that the server may open
MODELS = "[models.echo]\nengine = 'echo'\ncheckpoint = 'echo'\nprices = { input = 1, output = 2 }\n"
linux = pytest.mark.skipif(sys.platform != "linux", reason="/proc and 127.0.0.2")


@pytest.fixture
def own_process(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], str, str]]:
    """`complete-fn serve` with few open files, its address, and a key."""
    (tmp_path / "models.toml").write_text(MODELS)
    store = Store(tmp_path / "home" / "state.sqlite3")
    key = KeyStore(store).create("acme", "ann")
    store.close()
    command = [str(Path(sys.executable).with_name("complete-fn")), "serve", "--port", "0"]
    own = {"COMPLETE_FN_MODELS": str(tmp_path / "models.toml"), "COMPLETE_FN_HOME": str(tmp_path / "home")}

    def few_files() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (FILES // 4, FILES))

    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, **own}, preexec_fn=few_files
    ) as child:
        assert child.stderr is not None
        found = re.search(r"serves (http://\S+)/v1", child.stderr.readline())
        assert found
        yield child, found[1], key
        child.terminate()


def link(url: str) -> socket.socket:
    at = urlsplit(url)
    return socket.create_connection((at.hostname, at.port), 60)


def rest(of: socket.socket) -> bytes:
    """All that the server still sends until it closes the connection."""
    found = b""
    with contextlib.suppress(ConnectionError):
        while piece := of.recv(1 << 16):
            found += piece
    return found


def code_in(reply: bytes) -> str:
    return str(json.loads(reply.rpartition(b"\r\n\r\n")[2])["error"]["code"])


def drip(into: socket.socket, byte: bytes = b"x") -> None:
    """Send a byte now and then until the server has closed the connection."""
    with contextlib.suppress(OSError):
        while True:
            into.sendall(byte)
            time.sleep(0.05)


def dripping(into: socket.socket) -> threading.Thread:
    thread = threading.Thread(target=drip, args=(into,), daemon=True)
    thread.start()
    return thread


@linux
def test_half_sent_headers_keep_nobody_out(own_process: tuple[subprocess.Popen[str], str, str]) -> None:
    child, url, key = own_process
    limits = Path(f"/proc/{child.pid}/limits").read_text()
    assert re.search(rf"^Max open files +{FILES} +{FILES} ", limits, re.MULTILINE), limits
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with contextlib.ExitStack() as opened:
        opened.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        for _ in range(HALF_SENT):
            half = opened.enter_context(link(url))
            with contextlib.suppress(ConnectionError):
                half.sendall(HALF)
        for address in ("127.0.0.2", "127.0.0.1"):
            transport = httpx.HTTPTransport(local_address=address)
            headers = {"Authorization": f"Bearer {key}"}
            with httpx.Client(base_url=url, transport=transport, headers=headers, timeout=60) as client:
                assert client.get("/readyz").json() == {"status": "ready"}
                assert client.get("/v1/models").status_code == 200
                body = {"model": "echo", "messages": [{"role": "user", "content": "a b"}]}
                answer = client.post("/v1/chat/completions", json=body).json()
                assert answer["choices"][0]["message"]["content"] == "a b"


def test_headers_that_drip_are_ended(serve: Callable[..., Running]) -> None:
    running = serve(bounds=ConnectionBounds(header_seconds=0.4))
    with link(running.url) as first, link(running.url) as second, link(running.url) as silent:
        first.sendall(HALF)
        second.sendall(WHOLE)
        reply = b""
        while b'"ok"' not in reply:
            reply += second.recv(1 << 16)
        second.sendall(HALF)
        drips = [dripping(first), dripping(second)]
        for each in (first, second):
            reply = rest(each)
            assert reply.startswith(b"HTTP/1.1 408 ")
            assert code_in(reply) == "request_timeout"
        assert rest(silent) == b""
        for thread in drips:
            thread.join(60)


def test_headers_have_a_bound_of_bytes(serve: Callable[..., Running]) -> None:
    running = serve()
    with link(running.url) as many:
        many.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX-Context: " + b"x" * 40_000 + b"\r\n\r\n")
        assert many.recv(1 << 16).startswith(b"HTTP/1.1 200 ")
    with link(running.url) as endless:
        endless.sendall(b"GET /healthz HTTP/1.1\r\n")
        with pytest.raises(ConnectionError):  # the server has closed it
            endless.sendall((b"X-More: " + b"x" * 10_000 + b"\r\n") * 10_000)


def test_a_body_that_drips_is_ended_with_or_without_a_key(serve: Callable[..., Running]) -> None:
    running = serve(bounds=ConnectionBounds(header_seconds=0.4, body_seconds=0.4))
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n"
    for start, status in (("", b"408"), ("Authorization: Bearer cfn-none-none\r\n", b"401")):
        if status == b"401":
            running.state.keys.create("acme", "ann")
        with link(running.url) as slow:
            slow.sendall(f"{head}{start}\r\n{{".encode())
            thread = dripping(slow)
            assert rest(slow).startswith(b"HTTP/1.1 " + status)
            thread.join(60)


def test_a_reply_that_nobody_reads_is_ended(serve: Callable[..., Running]) -> None:
    running = serve(bounds=ConnectionBounds(reply_seconds=0.4))
    size = 32 << 20
    with running.http() as client:
        sent = client.post("/v1/files", files={"file": ("x.jsonl", b"\n" * size)}, data={"purpose": "user_data"})
        path = f"/v1/files/{sent.json()['id']}/content"
        assert len(client.get(path).content) == size
        with link(running.url) as slow:
            slow.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            assert slow.recv(1).startswith(b"H")
            time.sleep(1.5)
            assert len(rest(slow)) < size


def test_a_request_may_take_longer_than_its_headers(serve: Callable[..., Running]) -> None:
    engine = GatedEngine()
    running = serve(engine, bounds=ConnectionBounds(header_seconds=0.2, body_seconds=0.2, reply_seconds=0.2))
    timer = threading.Timer(1.0, engine.gate.set)
    timer.start()
    body: dict[str, Any] = {"model": "echo", "messages": [{"role": "user", "content": "slow one"}]}
    with running.http() as client:
        assert "slow one" in client.post("/v1/chat/completions", json=body).text
        with client.stream("POST", "/v1/chat/completions", json=body | {"stream": True}) as reply:
            assert "slow" in "".join(reply.iter_text())
    timer.join()


@linux
def test_one_address_may_not_have_all_connections(serve: Callable[..., Running]) -> None:
    engine = GatedEngine()
    running = serve(engine, bounds=ConnectionBounds(most=2, of_one=1))
    body = json.dumps({"model": "echo", "messages": [{"role": "user", "content": "slow"}]}).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += b"Content-Length: %d\r\n\r\n" % len(body)
    with contextlib.ExitStack() as opened:
        opened.callback(engine.gate.set)
        chat = opened.enter_context(link(running.url))
        chat.sendall(head + body)
        until(lambda: engine.held)
        with link(running.url) as another:
            reply = rest(another)
            assert reply.startswith(b"HTTP/1.1 503 ")
            assert code_in(reply) == "too_many_connections"
        with httpx.Client(transport=httpx.HTTPTransport(local_address="127.0.0.2"), timeout=60) as client:
            assert client.get(f"{running.url}/readyz").status_code == 200
        engine.gate.set()
        assert chat.recv(1 << 16).startswith(b"HTTP/1.1 200 ")
