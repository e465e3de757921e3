"""A fault of the operator's, and what it quotes, does not reach tenants; the log has it under the number they read."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import httpx
import pyarrow as pa
import pytest

from complete_fn import EchoEngine
from complete_fn.client import Client
from complete_fn.errors import EngineError, JobError, StoreLostError
from complete_fn.types import Completion, CompletionRequest
from tests.integration.server.conftest import Running

SECRET = "sk-live-0123456789 at postgresql://boss@10.0.0.7:5432/prod\nTraceback: a log's tail"
NUMBER = re.compile(r"fault ([0-9a-f]{8})")


class FaultyEngine(EchoEngine):
    """Fails as an endpoint does that quotes the key in its refusal."""

    def stream(self, requests: Iterable[CompletionRequest], tenant: str) -> Iterator[tuple[int, Completion]]:
        next(iter(requests))
        raise EngineError(f"http://10.0.0.9 refuses the key (401): \x1b[2J{SECRET}")


def chat(client: httpx.Client) -> httpx.Response:
    body = {"model": "echo", "messages": [{"role": "user", "content": "a"}]}
    return client.post("/v1/chat/completions", json=body)


def test_a_tenant_reads_a_number_and_the_log_says_more(
    serve: Callable[..., Running], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("complete_fn.worker.part_runner.RETRY_SECONDS", 0.01)
    running = serve(FaultyEngine(64))
    key = running.state.keys.create("acme", "ann")
    with caplog.at_level(logging.ERROR), running.http(key) as client:
        reply = chat(client)
        job = Client(running.url, key).submit(pa.table({"text": ["a"]}), "echo", "{text}")
        with pytest.raises(JobError):
            job.wait()
        failed = job.state()
        call_out = client.post(
            "/v1/dialects/postgres/complete",
            json={"model": "echo", "prompts": ["a"]},
            headers={"complete-batch-id": "b1"},
        )
    assert (reply.status_code, failed["status"]) == (503, "failed")
    for text in (reply.text, str(failed), call_out.text):
        assert NUMBER.search(text), text
        for part in ("sk-live", "10.0.0.", "Traceback"):
            assert part not in text
    messages = [record.getMessage() for record in caplog.records]
    for text in (reply.text, str(failed), call_out.text):
        (number,) = NUMBER.findall(text)
        (told,) = [message for message in messages if number in message]
        assert "sk-live-0123456789" in told
        assert "\x1b" not in told


def test_a_lost_store_is_not_described(
    serve: Callable[..., Running], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    running = serve(EchoEngine(64))
    key = running.state.keys.create("acme", "ann")

    def away(*_: Any, **__: Any) -> None:
        raise StoreLostError(f"The database cannot be used: {SECRET}")

    monkeypatch.setattr(running.state.jobs, "newest", away)
    monkeypatch.setattr(running.state.store, "ping", away)
    with running.http(key) as client:
        for path in ("/v1/jobs", "/readyz"):
            reply = client.get(path)
            assert reply.status_code == 503
            assert "10.0.0.7" not in reply.text
            assert NUMBER.search(reply.text)


def test_without_keys_the_caller_is_the_operator(serve: Callable[..., Running]) -> None:
    with serve(FaultyEngine(64)).http() as client:
        reply = chat(client)
    assert "refuses the key (401)" in reply.json()["error"]["message"]
    assert "Traceback" not in reply.text
