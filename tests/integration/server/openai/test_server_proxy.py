"""Chats of an API whose models run in workers: handed on, streamed, counted once, and nobody else gets in."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from decimal import Decimal
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from complete_fn import EchoEngine
from complete_fn.jobs.worker_store import Beat, ModelState, own_id
from complete_fn.ledger.usage import usage
from complete_fn.server.worker_api import Internal, internal_secret, serve_internal
from complete_fn.server.worker_proxy import Proxy
from complete_fn.service.engine_host import EngineHost
from complete_fn.service.state import ServiceState
from complete_fn.worker.fleet import Fleet
from complete_fn.worker.maintenance import Maintenance
from tests.integration.server.conftest import Running, at_service
from tests.integration.server.openai.test_server_streams import Steps, user


def never(slot: int) -> Any:
    raise AssertionError("no worker process is started here")


def announce(state: ServiceState, address: str) -> None:
    now = time.time()
    name = own_id()
    host, pid, _ = name.split("|")
    state.workers.beat(Beat(name, host, int(pid), now, now, now, address))


@pytest.fixture
def api(tmp_path: Path, models_file: Path) -> Iterator[Running]:
    """An API that runs nothing itself."""
    engines = EngineHost(ServiceState(tmp_path / "home", models_file, EchoEngine(64)))
    fleet = Fleet(engines.state.workers, never, 0, 0)
    with at_service(engines, maintenance=Maintenance(engines, fleet)) as running:
        yield running


@pytest.fixture
def work(api: Running, tmp_path: Path, models_file: Path) -> Iterator[Callable[..., Internal]]:
    """Call it for a worker on the same state, with an engine of its own."""
    opened: list[tuple[Internal, EngineHost]] = []

    def start(engine: Any) -> Internal:
        engines = EngineHost(ServiceState(tmp_path / "home", models_file, engine))
        internal = serve_internal(engines, "127.0.0.1", internal_secret(None, tmp_path / "home"))
        opened.append((internal, engines))
        announce(api.state, internal.address)
        return internal

    yield start
    for internal, engines in opened:
        internal.close()
        engines.close()


def test_a_chat_is_answered_by_the_worker_and_counted_once(api: Running, work: Callable[..., Internal]) -> None:
    engine = EchoEngine(64)
    work(engine)
    keys = api.state.keys
    key = keys.create("acme", "ann")
    keys.limit_tenant("acme", 600)
    with api.http(key) as client:
        body = {"model": "echo", "messages": user("one two three"), "max_tokens": 8}
        reply = client.post("/v1/chat/completions", json=body)
        assert reply.json()["choices"][0]["message"]["content"] == "one two three"
        assert reply.headers["x-complete-cost"] == "0.000009000"
        streamed = client.post("/v1/chat/completions", json=body | {"stream": True})
        assert streamed.headers["content-type"].startswith("text/event-stream")
        left = int(client.post("/v1/chat/completions", json=body).headers["x-ratelimit-remaining-tokens"])
    assert 540 < left < 600 - 6 - 6  # the third is still held at its most
    assert len(engine.requests) == 3
    (line,) = usage(api.state.store, ["user"], tenant="acme")
    assert (line.group, line.rows, line.cost) == (("ann",), 3, Decimal("0.000027"))


def test_text_streams_through_with_the_openai_client(api: Running, work: Callable[..., Internal]) -> None:
    engine = Steps()
    work(engine)
    stream = api.openai().chat.completions.create(
        model="echo", messages=user("x"), stream=True, stream_options={"include_usage": True}
    )
    texts = (c.choices[0].delta.content for c in stream if c.choices)
    assert (next(texts), next(texts)) == ("", "first ")
    engine.go.set()
    assert list(texts) == ["second", None]


def test_a_client_that_leaves_ends_its_row_at_the_worker(api: Running, work: Callable[..., Internal]) -> None:
    for stream in (True, False):
        engine = Steps()
        internal = work(engine)
        body = {"model": "echo", "messages": user("x"), "stream": stream}
        with api.http() as client, pytest.raises(httpx.ReadTimeout):
            client.post("/v1/chat/completions", json=body, timeout=1.0)
        assert engine.closed.wait(60)
        internal.close()
    assert sum(line.rows for line in usage(api.state.store)) == 1  # of which a word was told


def test_the_budget_of_the_tenant_holds_at_the_worker(api: Running, work: Callable[..., Internal]) -> None:
    work(EchoEngine(64))
    key = api.state.keys.create("acme", "ann")
    api.state.keys.set_daily_budget("acme", Decimal("0.000001"))
    with pytest.raises(openai.APIStatusError) as caught:
        api.openai(key).chat.completions.create(model="echo", messages=user("one two three"))
    assert (caught.value.status_code, caught.value.code) == (402, "budget_exceeded")


def test_errors_of_the_worker_come_through(api: Running, work: Callable[..., Internal]) -> None:
    work(EchoEngine(64))
    with pytest.raises(openai.BadRequestError) as caught:
        api.openai().chat.completions.create(model="echo", messages=user("w " * 70))
    assert caught.value.code == "context_length_exceeded"


def test_without_a_worker_one_is_wanted_and_the_client_may_try_again(api: Running) -> None:
    announce(api.state, "http://127.0.0.1:9")  # it has gone, and nobody noticed yet
    with api.http() as client:
        reply = client.post("/v1/chat/completions", json={"model": "echo", "messages": user("x")})
        assert (reply.status_code, reply.headers["retry-after"]) == (503, "5")
        assert reply.json()["error"]["code"] == "engine_unavailable"
        assert client.get("/readyz").status_code == 200


def test_only_the_api_gets_in_at_a_worker(work: Callable[..., Internal], tmp_path: Path) -> None:
    internal = work(EchoEngine(64))
    secret = internal_secret(None, tmp_path / "home")
    body = {"model": "echo", "messages": user("x")}
    as_whom = {"x-complete-tenant": "acme", "x-complete-user": "ann"}
    with httpx.Client(base_url=internal.address) as client:
        for wrong in ("", "Bearer x", f"Bearer {secret[:-1]}", "Bearer \u00e9"):
            headers = as_whom | {"authorization": wrong.encode()}
            assert client.post("/v1/chat/completions", json=body, headers=headers).status_code == 401
        good = {"authorization": f"Bearer {secret}"}
        assert client.post("/v1/chat/completions", json=body, headers=good).status_code == 401  # on whose behalf?
        assert client.post("/v1/chat/completions", json=body, headers=good | as_whom).status_code == 200
        assert client.get("/v1/files", headers=good | as_whom).status_code == 404
    assert (tmp_path / "home" / "internal.secret").stat().st_mode & 0o077 == 0


def test_a_worker_whose_host_is_silent_is_passed_over(
    api: Running, work: Callable[..., Internal], monkeypatch: pytest.MonkeyPatch
) -> None:
    work(EchoEngine(64))
    real = httpx.AsyncClient.send
    asked: list[str] = []

    async def send(client: httpx.AsyncClient, request: httpx.Request, **more: Any) -> httpx.Response:
        asked.append(request.url.host)
        if request.url.host == "192.0.2.1":
            raise httpx.ConnectTimeout("silent")
        return await real(client, request, **more)

    monkeypatch.setattr(httpx.AsyncClient, "send", send)
    now = time.time()
    silent = ModelState(True)  # warm, so that it comes first
    api.state.workers.beat(
        Beat("elsewhere|1|1.0", "elsewhere", 1, now, now, now, "http://192.0.2.1:9", models={"echo": silent})
    )
    with api.http() as client:
        body = {"model": "echo", "messages": user("one two three")}
        assert client.post("/v1/chat/completions", json=body).status_code == 200
    assert asked == ["192.0.2.1", "127.0.0.1"]


def test_secret_and_prompts_take_no_detour(tmp_path: Path, models_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy of the environment would be asked first, and nobody is there."""
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    state = ServiceState(tmp_path / "home", models_file, EchoEngine(64))
    proxy = Proxy(state, "secret", None)

    async def asked() -> int:
        async with proxy.client as client:
            return (await client.get(f"http://127.0.0.1:{server.server_port}/")).status_code

    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert asyncio.run(asked()) == 501  # it has no GET, but it was asked
        server.shutdown()
    state.close()
