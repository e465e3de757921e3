"""/metrics: what was done, in which state things are, and nobody's name."""

from __future__ import annotations

import time
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families


def samples(text: str) -> dict[tuple[str, ...], float]:
    found = {}
    for family in text_string_to_metric_families(text):
        for s in family.samples:
            found[(s.name, *(s.labels[k] for k in sorted(s.labels)))] = s.value
    return found


def test_requests_rows_tokens_and_cost_are_counted(running: Any) -> None:
    with running.http() as client:
        body = {"model": "echo", "messages": [{"role": "user", "content": "a b"}], "temperature": 0}
        for stream in (False, False, True):
            assert client.post("/v1/chat/completions", json=body | {"stream": stream}).status_code == 200
        client.get("/v1/nothing/secret-path")
        text, until = client.get("/metrics").text, time.monotonic() + 10
        while samples(text)["complete_fn_rows_total", "echo", "reused"] < 2 and time.monotonic() < until:
            text = client.get("/metrics").text  # a stream's lines are committed after its last piece
        again = samples(client.get("/metrics").text)
    found = samples(text)
    assert found["complete_fn_requests_total", "/v1/chat/completions", "200"] == 3
    assert found["complete_fn_requests_total", "none", "404"] == 1
    assert found["complete_fn_rows_total", "echo", "input"] == 1
    assert found["complete_fn_rows_total", "echo", "reused"] == 2
    assert found["complete_fn_tokens_total", "echo", "output"] == 2
    assert found["complete_fn_cost_total", "yours", "USD", "echo"] == pytest.approx(6e-6)
    assert found["complete_fn_first_token_seconds_count", "echo"] == 3
    assert found["complete_fn_lease_expiries_total",] == 0
    assert again["complete_fn_rows_total", "echo", "input"] == 1
    assert "secret-path" not in text
    assert "local" not in text


def test_where_there_are_keys_metrics_need_one_made_for_them(running: Any) -> None:
    usual = running.state.keys.create("acme", "ann")
    watcher = running.state.keys.create("ops", "prometheus", ["metrics"])
    with running.http() as client:
        assert client.get("/metrics").status_code == 401
    with running.http(usual) as client:
        assert client.get("/metrics").status_code == 403
    with running.http(watcher) as client:
        found = samples(client.get("/metrics").text)
        assert found["complete_fn_requests_total", "none", "401"] == 1
        assert found["complete_fn_workers", "false"] == 0
        assert client.get("/v1/usage").status_code == 403
