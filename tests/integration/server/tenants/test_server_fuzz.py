"""Requests that schemathesis makes of the OpenAPI description, to every route: whatever comes, no 5xx."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error

from complete_fn import EchoEngine
from complete_fn.jobs.api_keys import SCOPES
from complete_fn.server.fair_slots import CHATS_OF_ONE
from complete_fn.service.engine_host import EngineHost
from complete_fn.service.state import ServiceState
from tests.integration.server.conftest import at_service, write_models

QUICK, THOROUGH = 40, 4000  # requests


OPEN = ("/healthz", "/readyz")  # what a service tells everybody


@pytest.fixture(scope="module")
def operations(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Any]]:
    """Every operation of a running service without keys, to be called over HTTP."""
    folder = tmp_path_factory.mktemp("fuzz")
    with at_service(EngineHost(ServiceState(folder / "home", write_models(folder), EchoEngine(64)))) as running:
        yield described(running.url)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[list[Any], dict[str, str | None], Any]]:
    """(operations, keys, state) of a service with keys: a tenant's, revoked, expired and unknown ones, and none."""
    folder = tmp_path_factory.mktemp("guarded")
    with at_service(EngineHost(ServiceState(folder / "home", write_models(folder), EchoEngine(64)))) as running:
        known = running.state.keys
        mine, revoked = known.create("acme", "ann", list(SCOPES)), known.create("acme", "old", list(SCOPES))
        assert known.revoke(revoked.split("-")[1])
        expired = known.create("acme", "late", list(SCOPES), days=1e-6)
        keys = {"a tenant's": mine, "revoked": revoked, "expired": expired}
        keys["unknown"] = f"{mine[:-1]}{'1' if mine[-1] == '0' else '0'}"
        yield described(running.url), {**keys, "none": None}, running.state


def described(url: str) -> list[Any]:
    return [found.ok() for found in schemathesis.openapi.from_url(f"{url}/openapi.json").get_all_operations()]


def ask(
    operations: list[Any], requests: int, key: str | None = None, look: Callable[[Any, int], None] | None = None
) -> None:
    """Make so many requests with the key, none of which may be answered with a 5xx; `look` gets path and status."""
    made = st.sampled_from(operations).flatmap(lambda operation: operation.as_strategy())
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}

    @settings(
        max_examples=requests,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    @given(made)
    def no_server_error(case: Any) -> None:
        reply = case.call_and_validate(checks=[not_a_server_error], timeout=60, headers=headers)
        if look is not None:
            look(case, reply.status_code)

    no_server_error()


def faults(caplog: pytest.LogCaptureFixture) -> list[Any]:
    return [r for r in caplog.records if r.name.startswith("complete_fn") and r.levelno >= logging.ERROR]


def test_no_request_breaks_the_service(operations: list[Any], caplog: pytest.LogCaptureFixture) -> None:
    assert len(operations) > 20
    ask(operations, QUICK)
    assert not faults(caplog)


def test_no_request_of_a_tenant_breaks_the_service(guarded: Any, caplog: pytest.LogCaptureFixture) -> None:
    operations, keys, _ = guarded
    seen: list[int] = []
    ask(operations, QUICK, keys["a tenant's"], lambda _, status: seen.append(status))
    assert not faults(caplog)
    assert 401 not in seen


@pytest.mark.parametrize("whose", ["revoked", "expired", "unknown", "none"])
def test_nobody_without_a_valid_key_gets_anything(whose: str, guarded: Any, caplog: pytest.LogCaptureFixture) -> None:
    operations, keys, state = guarded
    before = state.storage.keys()
    seen: set[str] = set()

    def look(case: Any, status: int) -> None:
        seen.add(case.operation.path)
        assert status == 401 or case.operation.path in OPEN, (case.operation.path, status)

    ask(operations, QUICK, keys[whose], look)
    for operation in operations:  # each route at least once
        if operation.path not in seen:
            ask([operation], 1, keys[whose], look)
    assert not faults(caplog)
    assert state.storage.keys() == before


@pytest.mark.long
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("whose", ["a tenant's", "revoked", "expired", "none"])
def test_no_request_of_many_with_keys_breaks_the_service(whose: str, guarded: Any) -> None:
    operations, keys, _ = guarded
    ask(operations, THOROUGH, keys[whose])


@pytest.mark.long
@pytest.mark.timeout(3000)
def test_no_request_of_many_breaks_the_service(operations: list[Any]) -> None:
    ask(operations, THOROUGH)


def test_clients_that_stall_in_the_middle_of_a_body_hold_nobody_up(shared: Any) -> None:
    url = urlsplit(shared.url)
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 500\r\n\r\n{"
    stalled = [socket.create_connection((url.hostname, url.port)) for _ in range(CHATS_OF_ONE + 20)]
    try:
        for link in stalled:
            link.sendall(head)
        reply = shared.openai().chat.completions.create(model="echo", messages=[{"role": "user", "content": "a b"}])
        assert reply.choices[0].message.content == "a b"
    finally:
        for link in stalled:
            link.close()
