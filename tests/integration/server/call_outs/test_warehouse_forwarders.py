"""deploy/redshift and deploy/bigquery: the forwarders, fed recorded payloads, in front of a real service."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import ThreadingHTTPServer

import httpx
import pytest

from deploy.bigquery.forwarder import Forwarder
from deploy.redshift import forwarder as redshift
from tests.integration.server.call_outs.test_server_dialects import Counting, body, recorded
from tests.integration.server.conftest import Running


@pytest.fixture
def service(serve: Callable[..., Running], monkeypatch: pytest.MonkeyPatch) -> Running:
    """A service that wants a key, and the forwarders' settings for it."""
    running = serve(engine=Counting())
    monkeypatch.setenv("COMPLETE_FN_URL", running.url)
    monkeypatch.setenv("COMPLETE_FN_KEY", running.state.keys.create("acme", "ann"))
    return running


@pytest.fixture
def bigquery(service: Running) -> Iterator[str]:
    """URL of the forwarder that BigQuery calls."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Forwarder)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join(30)


def test_redshift_gets_the_recorded_reply_and_its_errors(service: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    assert redshift.forward(recorded("redshift")) == recorded("redshift", "reply")
    monkeypatch.setenv("COMPLETE_FN_FUNCTION", "complete_details")
    typed = redshift.forward(body("redshift", [["echo", "word " * 100]], "typed")[0])
    assert json.loads(typed["results"][0])["error"]["code"] == "prompt_too_long"
    bad = redshift.forward(body("redshift", [["nope", "x"]], "bad")[0])
    assert bad["success"] is False
    assert "'nope'" in bad["error_msg"]
    monkeypatch.setenv("COMPLETE_FN_KEY", "cfn-wrong")
    refused = redshift.forward(recorded("redshift"))
    assert refused["success"] is False
    assert "API key" in refused["error_msg"]


def test_redshift_is_asked_for_until_its_rows_are_there(
    service: Running, serve: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    from complete_fn.server.call_out_replies import dialect_of

    monkeypatch.setattr(dialect_of("redshift"), "patience", 0.1)
    gate = threading.Event()
    engine = service.state.engine
    assert isinstance(engine, Counting)
    engine.gate = gate
    statuses: list[int] = []
    ask = redshift.ask

    def watched(*given: object) -> object:
        status, reply = ask(*given)
        statuses.append(status)
        if status == 202:
            gate.set()
        return status, reply

    monkeypatch.setattr(redshift, "ask", watched)
    assert redshift.forward(recorded("redshift")) == recorded("redshift", "reply")
    assert statuses[0] == 202
    assert statuses[-1] == 200
    assert len(engine.asked) == 2  # two distinct prompts


def test_redshift_is_told_when_nobody_answers(service: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPLETE_FN_URL", "http://127.0.0.1:1")
    monkeypatch.setattr(redshift, "SECONDS", 0.2)
    monkeypatch.setattr(redshift, "PAUSE", 0.05)
    assert redshift.forward(recorded("redshift"))["error_msg"].startswith("complete-fn answers nothing")


def test_bigquery_gets_the_recorded_reply_and_its_errors(bigquery: str, monkeypatch: pytest.MonkeyPatch) -> None:
    url, headers = f"{bigquery}/v1/dialects/bigquery/complete", {"Authorization": "Bearer token of BigQuery"}
    reply = httpx.post(url, json=recorded("bigquery"), headers=headers, timeout=60)
    assert (reply.status_code, reply.json()) == (200, recorded("bigquery", "reply"))
    bad = httpx.post(url, json=body("bigquery", [["nope", "x"]], "bad")[0], timeout=60)
    assert bad.status_code == 400
    assert "'nope'" in bad.json()["errorMessage"]
    assert httpx.post(f"{bigquery}/v1/jobs", json={}, timeout=60).status_code == 400
    monkeypatch.setenv("COMPLETE_FN_KEY", "cfn-wrong")
    refused = httpx.post(url, json=recorded("bigquery"), timeout=60)
    assert refused.status_code == 401
    assert "API key" in refused.json()["errorMessage"]
    monkeypatch.setenv("COMPLETE_FN_URL", "http://127.0.0.1:1")
    gone = httpx.post(url, json=recorded("bigquery"), timeout=60)
    assert (gone.status_code, gone.headers["retry-after"]) == (503, "5")
