"""Requests that schemathesis makes of the OpenAPI description, to every route: whatever comes, no 5xx."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error

from complete_fn import EchoEngine
from complete_fn.server.fair_slots import CHATS_OF_ONE
from complete_fn.service.engine_host import EngineHost
from complete_fn.service.state import ServiceState
from tests.integration.server.conftest import at_service, write_models

QUICK, THOROUGH = 40, 4000  # requests


@pytest.fixture(scope="module")
def operations(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Any]]:
    """Every operation of a running service, to be called over HTTP."""
    folder = tmp_path_factory.mktemp("fuzz")
    with at_service(EngineHost(ServiceState(folder / "home", write_models(folder), EchoEngine(64)))) as running:
        schema = schemathesis.openapi.from_url(f"{running.url}/openapi.json")
        yield [found.ok() for found in schema.get_all_operations()]


def ask(operations: list[Any], requests: int) -> None:
    made = st.sampled_from(operations).flatmap(lambda operation: operation.as_strategy())

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
        case.call_and_validate(checks=[not_a_server_error], timeout=60)

    no_server_error()


def test_no_request_breaks_the_service(operations: list[Any], caplog: pytest.LogCaptureFixture) -> None:
    assert len(operations) > 20
    ask(operations, QUICK)
    assert not [r for r in caplog.records if r.name.startswith("complete_fn") and r.levelno >= logging.ERROR]


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
