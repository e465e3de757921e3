"""What one tenant does, however much of it, does not keep another tenant from being answered."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx
import pyarrow as pa
import pytest
from starlette.types import Message

from complete_fn import EchoEngine
from complete_fn.client import Client
from complete_fn.engines.base import prompt_text
from complete_fn.jobs.api_keys import SCOPES
from complete_fn.server.auth import Door, scope_of
from complete_fn.types import Completion, CompletionRequest
from tests.integration.server.conftest import Running

GATE_SECONDS = 60.0  # a test that fails lets its server end after so long
CHATS = 330


class GatedEngine(EchoEngine):
    """Answers prompts with the word "slow" only after `gate` is set. `held` counts them."""

    def __init__(self) -> None:
        super().__init__(64)
        self.gate, self.held = threading.Event(), 0

    def stream(self, requests: Iterable[CompletionRequest], tenant: str) -> Iterator[tuple[int, Completion]]:
        for position, request in enumerate(requests):
            if "slow" in str(prompt_text(request)):
                self.held += 1
                self.gate.wait(GATE_SECONDS)
            yield position, self.complete(request)


Served = tuple[Running, GatedEngine, str, str]


@pytest.fixture
def served(serve: Callable[..., Running]) -> Iterator[Served]:
    """(a server, its engine, the key of a tenant that attacks, the key of another)"""
    engine = GatedEngine()
    running = serve(engine)
    yield running, engine, running.state.keys.create("noisy", "n"), running.state.keys.create("quiet", "q")
    engine.gate.set()


def chat(client: httpx.Client, text: str) -> httpx.Response:
    body = {"model": "echo", "messages": [{"role": "user", "content": text}]}
    return client.post("/v1/chat/completions", json=body)


def until(seen: Callable[[], object]) -> None:
    end = time.monotonic() + 30
    while not seen() and time.monotonic() < end:
        time.sleep(0.02)
    assert seen()


def test_slow_chats_of_one_tenant_leave_lanes_for_another(served: Served) -> None:
    running, engine, noisy, quiet = served
    begun: list[int] = []
    limits = httpx.Limits(max_connections=CHATS)
    headers = {"Authorization": f"Bearer {noisy}"}
    with (
        httpx.Client(base_url=running.url, headers=headers, timeout=180, limits=limits) as attacker,
        running.http(quiet) as other,
        ThreadPoolExecutor(CHATS) as pool,
    ):

        def attack(number: int) -> int:
            begun.append(number)
            return chat(attacker, f"slow {number}").status_code

        attacks = [pool.submit(attack, number) for number in range(CHATS)]
        until(lambda: len(begun) == CHATS)
        time.sleep(1.0)
        replies = [chat(other, f"hello {n}") for n in range(5)]
        assert [reply.status_code for reply in replies] == [200] * 5
        assert not any(attack.done() and attack.result() == 200 for attack in attacks)
        engine.gate.set()
        found = {attack.result() for attack in attacks}
    assert 200 in found
    assert found <= {200, 429}


def test_slow_tables_of_one_tenant_leave_a_slot_for_another(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    running, engine, noisy, quiet = served
    submit, held = running.state.uploads.save, []

    def slow(tenant: str, *more: Any) -> Any:
        if tenant == "noisy":
            held.append(1)
            engine.gate.wait(GATE_SECONDS)
        return submit(tenant, *more)

    monkeypatch.setattr(running.state.uploads, "save", slow)
    with running.http(noisy) as attacker, ThreadPoolExecutor(8) as pool:
        attacks: list[Future[httpx.Response]] = [
            pool.submit(upload, attacker, f"text\n{number}\n".encode()) for number in range(8)
        ]
        until(lambda: len(held) == 2)
        job = Client(running.url, quiet).submit(pa.table({"text": ["a", "b"]}), "echo", "Say: {text}")
        assert job.wait()["rows"]["done"] == 2
        assert not any(attack.done() for attack in attacks)
        engine.gate.set()
        assert {attack.result().status_code for attack in attacks} == {200}


def upload(client: httpx.Client, content: bytes) -> httpx.Response:
    return client.post("/v1/files", files={"file": ("t.csv", content)}, data={"purpose": "user_data"})


def test_reports_hold_neither_the_health_check_nor_another_tenants_jobs(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    running, engine, noisy, quiet = served
    held = []

    def slow(*_: Any) -> list[Any]:
        held.append(1)
        with running.state.store.read():
            engine.gate.wait(GATE_SECONDS)
        return []

    monkeypatch.setattr("complete_fn.server.routes.jobs.usage.usage", slow)
    with running.http(noisy) as attacker, running.http(quiet) as other, ThreadPoolExecutor(44) as pool:
        attacks = [pool.submit(attacker.get, "/v1/usage") for _ in range(44)]
        until(lambda: len(held) == 3)
        time.sleep(0.5)
        assert len(held) == 3
        assert [other.get(path).status_code for path in ("/readyz", "/v1/jobs", "/v1/files", "/v1/models")] == [200] * 4
        assert chat(other, "hello").status_code == 200
        engine.gate.set()
        found = [attack.result() for attack in attacks]
    assert {reply.status_code for reply in found} == {200, 429}
    assert all("Retry-After" in reply.headers for reply in found if reply.status_code == 429)


def test_connections_that_are_all_in_use_are_a_503(
    serve: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    running = serve()
    pool: Any = running.state.store.engine.pool
    monkeypatch.setattr(pool, "_timeout", 0.1)
    opened = []
    try:
        while True:
            try:
                opened.append(running.state.store.engine.connect())
            except Exception:
                break
        with running.http() as client:
            reply = client.get("/v1/jobs")
            ready = client.get("/readyz")
    finally:
        for connection in opened:
            connection.close()
    assert (reply.status_code, ready.status_code) == (503, 503)
    assert "Retry-After" in reply.headers
    assert reply.json()["error"]["code"] == "store_busy"


def test_every_route_of_the_api_has_its_scope(shared: Running) -> None:
    with shared.http() as client:
        paths = client.get("/openapi.json").json()["paths"]
    without = {path for path in paths if path.startswith("/v1/") and scope_of(path) is None}
    assert without == {"/v1/models", "/v1/models/{name}"}
    assert {scope_of(path) for path in paths} - {None} == set(SCOPES)


def test_a_body_is_not_read_for_a_key_without_the_scope(served: Served) -> None:
    running, _, _, _ = served
    key = running.state.keys.create("noisy", "n", ["complete"])
    sent: list[Message] = []

    async def unreachable(*_: Any) -> None:
        raise AssertionError("the request was let in")

    async def unread() -> Message:
        raise AssertionError("the body was read")

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {
        **{"type": "http", "method": "POST", "path": "/v1/files", "query_string": b"", "scheme": "http"},
        **{"server": ("127.0.0.1", 80), "headers": [(b"authorization", f"Bearer {key}".encode())]},
    }
    asyncio.run(Door(unreachable, running.state, loopback=False)(scope, unread, send))
    assert sent[0]["status"] == 403
