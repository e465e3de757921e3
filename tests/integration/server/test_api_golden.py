"""What the service answers, route by route, kept in tests/golden/api: status, headers and body of each reply.

The replies to warehouses' call-outs are in call_outs/test_call_outs_golden.py.
"""

from __future__ import annotations

import gzip
import json
import re
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from complete_fn import EchoEngine, __version__
from complete_fn.server.worker_api import internal_secret, serve_internal
from complete_fn.service.engine_host import EngineHost
from complete_fn.service.state import Limits, ServiceState
from tests.api_recorder import CSV, WAREHOUSES, Moody, Recorder, without_time
from tests.golden_files import GOLDEN, check_golden, check_names, rewriting
from tests.integration.server.conftest import Running

FAMILIES = (
    *("models", "chat", "chat_streamed", "completions", "files", "jobs", "job_results", "job_sources", "batches"),
    *("batches_queued", "estimate", "usage", "health", "access", "limits", "worker_api", "no_worker", "openapi"),
    "call_outs_slow",
)
CHAT = "/v1/chat/completions"
SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"], "additionalProperties": False}
pytestmark = pytest.mark.usefixtures("plain_settings")


def user(text: Any, **more: Any) -> dict[str, Any]:
    return {"model": "echo", "messages": [{"role": "user", "content": text}], "temperature": 0, **more}


def test_models(record: Recorder) -> None:
    record.ask("GET /v1/models")
    record.ask("GET /v1/models/echo")
    record.ask("GET /v1/models/nothing")
    record.check("models")


def test_chat_completions(record: Recorder) -> None:
    chat = "POST /v1/chat/completions"
    record.ask(chat, json=user("one two three"))
    record.ask(chat, json=user("one two three"))  # known by now
    record.ask(chat, json=user("one two three", max_tokens=2, seed=1, stop=["x"], top_p=0.5, user="ann", store=False))
    parts = [{"type": "text", "text": "in "}, {"type": "text", "text": "parts"}]
    messages = [{"role": "developer", "content": "Be short."}, {"role": "user", "content": parts}]
    record.ask(chat, json={"model": "echo", "messages": messages, "max_completion_tokens": 8})
    schema = {"type": "json_schema", "json_schema": {"name": "it", "schema": SCHEMA}}
    record.ask(chat, json=user("an object", response_format=schema))
    record.ask(chat, json=user("any object", response_format={"type": "json_object"}))
    for text in ("bad", "late", "misfit", "down", "broken", "word " * 70, "half \ud800 a character"):
        content = json.dumps(user(text)).encode()
        record.ask(chat, content=content, headers={"content-type": "application/json"})
    record.ask(chat, json=user("x") | {"model": "nothing"})
    record.ask(chat, json=user("x", tools=[]))
    record.ask(chat, json=user("x", temperature=9))
    record.ask(chat, json=user("x", n=2))
    record.ask(chat, json=user("x", max_tokens=0))
    record.ask(chat, json=user("x", response_format={"type": "xml"}))
    record.ask(chat, json=user("x", response_format=schema | {"json_schema": {"schema": {"type": 5}}}))
    record.ask(chat, json={"model": "echo"})
    record.ask(chat, json={"model": "echo", "messages": []})
    record.ask(chat, json={"model": "echo", "messages": [{"role": "tool", "content": "x"}]})
    record.ask(chat, content=b"no json", headers={"content-type": "application/json"})
    record.ask(chat, content=b"")
    record.ask("GET /v1/chat/completions")
    record.ask("POST /v1/chat/nothing", json={})
    record.check("chat")


def test_streamed_chats(record: Recorder) -> None:
    chat = "POST /v1/chat/completions"
    record.ask(chat, json=user("one two", stream=True))
    record.ask(chat, json=user("one two", stream=True, stream_options={"include_usage": True}))
    record.ask(chat, json=user("three four five", stream=True, max_tokens=2))
    record.ask(chat, json=user("bad", stream=True))
    record.ask(chat, json=user("word " * 70, stream=True))
    record.ask("POST /v1/completions", json={"model": "echo", "prompt": ["a b", "a b"], "stream": True, "seed": 1})
    record.ask("POST /v1/completions", json={"model": "echo", "prompt": ["c", "bad"], "stream": True, "temperature": 0})
    record.check("chat_streamed")


def test_completions(record: Recorder) -> None:
    ask = "POST /v1/completions"
    plain = {"model": "echo", "temperature": 0}
    record.ask(ask, json=plain | {"prompt": "one {two} three"})
    record.ask(ask, json=plain | {"prompt": ["a b c", "d", "a b c"], "max_tokens": 2})
    record.ask(ask, json=plain | {"prompt": ["fine", "bad", "late"]})
    record.ask(ask, json=plain | {"prompt": ["bad", "bad late"]})
    record.ask(ask, json=plain | {"prompt": []})
    record.ask(ask, json=plain | {"prompt": [1, 2]})
    record.ask(ask, json=plain | {"prompt": "x", "echo": True})
    record.ask(ask, json=plain | {"prompt": "x", "logprobs": 1})
    record.ask(ask, json=plain | {"prompt": "x", "model": "nothing"})
    record.check("completions")


def test_files(record: Recorder) -> None:
    send = "POST /v1/files"
    table, purpose = {"file": ("rows.csv", CSV)}, {"purpose": "user_data"}
    first = record.ask(send, files=table, data=purpose).json()["id"]
    later = {"expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"}
    second = record.ask(send, files={"file": ("a/b\\c.jsonl", b'{"x": 1}\n')}, data={"purpose": "batch"} | later).json()
    record.ask("GET /v1/files")
    record.ask("GET /v1/files", params={"limit": 1})
    record.ask("GET /v1/files", params={"limit": 1, "after": second["id"]})
    record.ask("GET /v1/files", params={"purpose": "batch"})
    record.ask("GET /v1/files", params={"limit": 0})
    record.ask(f"GET /v1/files/{first}")
    record.ask(f"GET /v1/files/{first}/content")
    record.ask(f"DELETE /v1/files/{first}")
    for request in (f"GET /v1/files/{first}", f"GET /v1/files/{first}/content", f"DELETE /v1/files/{first}"):
        record.ask(request)
    record.ask(send, files=table, data={"purpose": "assistants"})
    record.ask(send, files={"file": ("rows.doc", CSV)}, data=purpose)
    record.ask(send, files=table, data=purpose | {"expires_after[anchor]": "created_at"})
    record.ask(send, files=table, data=purpose | later | {"expires_after[seconds]": "60"})
    record.ask(send, files=table)
    record.ask(send, data=purpose)
    record.check("files")


def test_jobs_that_wait(queued: Recorder) -> None:
    record = queued
    file = record.upload()
    body = {"model": "echo", "prompt": "Say: {text}", "source": {"file_id": file}}
    full = {"options": {"max_tokens": 4}, "column": "said", "max_cost": "0.5", "priority": 3, "query_tag": "t"}
    submit = "POST /v1/jobs"
    first = record.ask(submit, json=body | full | {"idempotency_key": "k"}).json()["id"]
    record.ask(submit, json=body | full, headers={"Idempotency-Key": "k"})  # the same job
    record.ask(submit, json=body, headers={"Idempotency-Key": "k"})
    second = record.ask(submit, json=body | {"max_cost": 2}).json()["id"]
    record.ask("GET /v1/jobs")
    record.ask("GET /v1/jobs", params={"limit": 1, "after": second})
    record.ask(f"GET /v1/jobs/{first}")
    record.ask(f"GET /v1/jobs/{first}/results")
    record.ask(f"GET /v1/jobs/{first}/results", params={"partial": True, "format": "jsonl"})
    record.ask(f"POST /v1/jobs/{first}/rerun")
    record.ask(f"POST /v1/jobs/{first}/deliver")
    record.ask(f"DELETE /v1/jobs/{first}")
    record.ask(f"POST /v1/jobs/{first}/cancel")
    record.ask(f"POST /v1/jobs/{first}/cancel")
    record.ask(f"GET /v1/jobs/{first}/results", params={"format": "jsonl", "details": True})
    record.ask(f"POST /v1/jobs/{first}/rerun", json={"max_cost": "none"})
    record.ask(f"POST /v1/jobs/{first}/rerun", json={"max_cost": "1"})
    record.http.post(f"/v1/jobs/{first}/cancel")
    record.ask(f"DELETE /v1/jobs/{first}")
    for request in (f"GET /v1/jobs/{first}", f"POST /v1/jobs/{first}/cancel", f"DELETE /v1/jobs/{first}"):
        record.ask(request)
    record.ask(submit, json=body | {"source": {"file_id": "file-" + 24 * "0"}})
    for wrong in (
        {"model": "nothing"},
        {"prompt": "no column"},
        {"prompt": "{txt}"},
        {"prompt": "{text"},
        {"options": {"topp": 1}},
        {"options": {"max_tokens": 0}},
        {"options": {"strict": True}},
        {"column": "text"},
        {"column": ""},
        {"max_cost": "much"},
        {"priority": 101},
        {"source": {}},
        {"source": {"uri": "/etc/passwd.csv"}},
        {"source": {"uri": "http://127.0.0.1/x.csv"}},
        {"source": {"connection": "crm", "sql": "SELECT 1"}},
        {"source": {"connection": "crm"}},
        {"sink": {"uri": "/tmp/x.csv"}},
        {"sink": {"uri": "/tmp/x.csv", "key": "id"}},
        {"sink": {"connection": "crm", "table": "t"}},
        {"query": "tag"},
    ):
        record.ask(submit, json=body | wrong)
    record.ask(submit, json={})
    record.ask("GET /v1/jobs", params={"after": "job_" + 24 * "0"})
    record.check("jobs")


def test_results_of_jobs(record: Recorder) -> None:
    rows = b'{"id": 1, "text": "one"}\n{"id": 2, "text": null}\n{"id": 3, "text": "once", "more": {"a": [1]}}\n'
    body = {"model": "echo", "prompt": "Say: {text}", "source": {"file_id": record.upload(rows, "rows.jsonl")}}
    changing = ("status", "started_at", "rows", "usage", "cost", "eta_seconds")
    job = record.ask("POST /v1/jobs", json=body, open_fields=changing).json()["id"]
    place = f"/v1/jobs/{job}"
    record.wait(place)
    record.ask(f"GET {place}")
    for kind in ("parquet", "jsonl", "arrow", "csv"):
        record.ask(f"GET {place}/results", params={"format": kind})
        record.ask(f"GET {place}/results", params={"format": kind, "details": True})
    record.ask(f"GET {place}/results", params={"partial": True, "format": "csv"})
    record.ask(f"GET {place}/results", params={"format": "xml"})
    record.ask(f"POST {place}/rerun", open_fields=changing)
    record.wait(place)
    record.ask(f"GET {place}")
    record.ask(f"GET {place}/results", params={"format": "csv"})
    record.ask(f"POST {place}/rerun")
    record.ask(f"POST {place}/deliver")
    record.ask("GET /v1/jobs")
    record.ask(f"DELETE {place}")
    record.check("job_results")


def test_jobs_that_read_and_write_by_themselves(
    serve: Callable[..., Running], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "in" / "rows.csv").write_bytes(CSV)
    with closing(sqlite3.connect(tmp_path / "docs.db")) as docs, docs:
        docs.execute("CREATE TABLE docs (id INTEGER PRIMARY KEY, text VARCHAR(20))")
        docs.execute("INSERT INTO docs VALUES (1, 'one'), (2, NULL)")
    monkeypatch.setenv("COMPLETE_FN_SOURCES", f"{tmp_path}/in")
    monkeypatch.setenv("COMPLETE_FN_SINKS", f"{tmp_path}/out")
    monkeypatch.setenv("DOCS_URL", f"sqlite:///{tmp_path}/docs.db")
    running = serve(EchoEngine(64))
    running.state.connections.add("local", "docs", "DOCS_URL", writable=True)
    running.state.connections.add("local", "view", "DOCS_URL", writable=False)
    with running.http() as http:
        record = Recorder(http, {str(tmp_path): "<folder>"})
        body = {"model": "echo", "prompt": "{text}", "source": {"uri": f"{tmp_path}/in/rows.csv"}}
        table = {"connection": "docs", "sql": "SELECT id, text FROM docs ORDER BY id"}
        jobs = [
            body | {"sink": {"uri": f"{tmp_path}/out/answers.jsonl"}},
            body | {"source": table, "sink": {"connection": "docs", "table": "answers", "key": "id"}},
        ]
        for place in [f"/v1/jobs/{http.post('/v1/jobs', json=job).json()['id']}" for job in jobs]:
            record.wait(place)
            record.ask(f"GET {place}")
            record.ask(f"GET {place}/results", params={"format": "jsonl"})
        record.exchanges.append({"answers.jsonl": (tmp_path / "out" / "answers.jsonl").read_text().splitlines()})
        for wrong in (
            {"source": {"uri": f"{tmp_path}/in/no.csv"}},
            {"source": {"uri": f"{tmp_path}/docs.db"}},
            {"source": table | {"sql": "DROP TABLE docs"}},
            {"source": table | {"sql": "SELECT 1; SELECT 2"}},
            {"source": table | {"sql": "SELECT missing FROM docs"}},
            {"source": table | {"connection": "other"}},
            {"sink": {"uri": f"{tmp_path}/in/a.csv"}},
            {"sink": {"connection": "view", "table": "answers"}},
            {"sink": {"connection": "docs", "table": "answers", "key": "text"}},
            {"sink": {"connection": "docs", "table": "no;name"}},
        ):
            record.ask("POST /v1/jobs", json=body | wrong)
        record.check("job_sources")


def line(name: str, text: str, **more: Any) -> bytes:
    body = {"model": "echo", "temperature": 0, "messages": [{"role": "user", "content": text}]}
    return json.dumps({"custom_id": name, "method": "POST", "url": CHAT, "body": body, **more}).encode() + b"\n"


def test_batches(record: Recorder) -> None:
    def sent(content: bytes, purpose: str = "batch", **more: Any) -> httpx.Response:
        given = {"input_file_id": record.upload(content, "batch.jsonl", purpose), "endpoint": CHAT}
        body = {**given, "completion_window": "24h", **more}
        return record.ask("POST /v1/batches", json=body, open_fields=("status", "in_progress_at", "request_counts"))

    batch = sent(line("a", "one two") + line("b", "bad") + line("c", "one two"), metadata={"night": "1"}).json()["id"]
    done = record.wait(f"/v1/batches/{batch}")
    record.ask(f"GET /v1/batches/{batch}")
    record.ask("GET /v1/batches")
    for kind in ("output_file_id", "error_file_id"):
        record.ask(f"GET /v1/files/{done[kind]}")
        lines = record.ask(f"GET /v1/files/{done[kind]}/content").text.splitlines()
        record.exchanges[-1]["body"] = [without_time(json.loads(found), ()) for found in lines]
    record.ask(f"POST /v1/batches/{batch}/cancel")
    record.ask(f"DELETE /v1/batches/{batch}")
    record.ask(f"GET /v1/batches/{batch}")
    sent(b"")
    sent(b"no json\n")
    sent(line("a", "x") + line("a", "y"))
    sent(line("a", "x", url="/v1/completions"))
    sent(line("a", "x", body={"model": "nothing", "messages": [{"role": "user", "content": "x"}]}))
    sent(line("a", "x", body={"model": "echo"}))
    sent(line("a", "x"), purpose="user_data")
    sent(line("a", "x"), endpoint="/v1/embeddings")
    sent(line("a", "x"), completion_window="1h")
    record.check("batches")


def test_batches_that_wait(queued: Recorder) -> None:
    record = queued
    file = record.upload(line("a", "one"), "batch.jsonl", "batch")
    body = {"input_file_id": file, "endpoint": CHAT, "completion_window": "24h"}
    batch = record.ask("POST /v1/batches", json=body).json()["id"]
    record.ask(f"GET /v1/batches/{batch}")
    record.ask(f"DELETE /v1/batches/{batch}")
    error = record.ask(f"POST /v1/batches/{batch}/cancel").json()["error_file_id"]
    record.ask(f"GET /v1/files/{error}/content")
    record.ask(f"GET /v1/jobs/{batch}")
    record.check("batches_queued")


def test_estimates(record: Recorder) -> None:
    ask = "POST /v1/estimate"
    # A model that no other test asks: estimates know of earlier runs.
    body = {"model": "other", "prompt": "Say: {text}", "source": {"file_id": record.upload()}}
    record.ask(ask, json=body)
    record.ask(ask, json=body | {"options": {"max_tokens": 4, "reorder_fields": True}})
    record.ask(ask, json=body | {"model": "nothing"})
    record.ask(ask, json=body | {"prompt": "{txt}"})
    record.ask(ask, json=body | {"options": {"temperature": 9}})
    record.ask(ask, json=body | {"source": {"file_id": "file-" + 24 * "0"}})
    record.ask(ask, json=body | {"max_cost": "1"})
    record.check("estimate")


def test_usage(record: Recorder) -> None:
    record.ask("GET /v1/usage")
    for text in ("one two", "one two", "three"):
        record.http.post(CHAT, json=user(text))
    record.ask("GET /v1/usage")
    record.ask("GET /v1/usage", params={"by": "model,user,tenant,query_tag,job,engine"})
    record.ask("GET /v1/usage", params={"since": "2999-01-01"})
    record.ask("GET /v1/usage", params={"by": "week"})
    record.ask("GET /v1/usage", params={"since": "2026-01-01", "until": "2026-01-02T10:30"})
    record.ask("GET /v1/usage", params={"sinse": "2026-01-01"})
    record.ask("GET /v1/usage", params={"since": "lately"})
    record.check("usage")


def test_health_and_the_names_of_metrics(serve: Callable[..., Running]) -> None:
    with serve(EchoEngine(64)).http() as http:
        note_health(Recorder(http))


def note_health(record: Recorder) -> None:
    record.ask("GET /healthz")
    record.ask("GET /readyz")
    record.http.post(CHAT, json=user("one"))
    reply = record.ask("GET /metrics")
    families = text_string_to_metric_families(reply.text)
    body = record.exchanges[-1]["body"] = {
        f"{family.name} ({family.type})": {
            "help": family.documentation,
            "samples": sorted({f"{s.name}{{{', '.join(sorted(s.labels))}}}" for s in family.samples}),
        }
        for family in families
    }
    for name in ("warm_workers", "tokens_per_second", "cold_start_seconds"):
        body[f"complete_fn_{name} (gauge)"]["samples"] = "<once it is measured>"
    record.ask("GET /docs")
    record.exchanges[-1]["body"] = "<page>"
    record.ask("GET /nothing")
    record.ask("POST /healthz")
    record.check("health")


def test_who_may_do_what(serve: Callable[..., Running]) -> None:
    running = serve(EchoEngine(64))
    with running.http() as http:
        record = Recorder(http)
        record.ask("GET /v1/models", headers={"Host": "evil.example"})
        record.ask("GET /v1/models", headers={"Origin": "https://evil.example"})
        keys = {scope: running.state.keys.create("acme", "ann", [scope]) for scope in ("complete", "jobs", "usage")}
        for request in ("GET /v1/models", "POST /v1/chat/completions", "GET /metrics", "GET /healthz", "GET /readyz"):
            record.ask(request)
        record.ask("GET /v1/models", headers={"Authorization": "Bearer nonsense"})
        record.ask("GET /v1/models", headers={"Authorization": "Basic nonsense"})
        for scope, request, body in (
            ("usage", "POST /v1/chat/completions", user("x")),
            ("usage", "POST /v1/completions", {"model": "echo", "prompt": "x"}),
            ("complete", "GET /v1/files", None),
            ("complete", "GET /v1/jobs", None),
            ("complete", "GET /v1/batches", None),
            ("jobs", "GET /v1/usage", None),
            ("jobs", "GET /metrics", None),
        ):
            http.headers["Authorization"] = f"Bearer {keys[scope]}"
            record.ask(request, json=body)
        for warehouse in WAREHOUSES:
            record.ask(f"POST /v1/dialects/{warehouse}/complete", json={})
        http.headers["Authorization"] = "Bearer nonsense"
        for warehouse in WAREHOUSES:
            record.ask(f"POST /v1/dialects/{warehouse}/complete", json={})
        record.check("access")


def test_limits_of_size_money_and_rate(serve: Callable[..., Running]) -> None:
    running = serve(EchoEngine(64), limits=Limits(upload_bytes=1_000, body_bytes=1_000, job_rows=3, batch_rows=1))
    with running.http() as http:
        record = Recorder(http)
        record.ask("POST /v1/chat/completions", json=user("x" * 1_000))
        record.ask("POST /v1/files", files={"file": ("t.csv", b"x" * 1_001)}, data={"purpose": "user_data"})
        record.ask("POST /v1/files", files={"file": ("t.csv", b"x" * 100_000)}, data={"purpose": "user_data"})
        body = {"model": "echo", "prompt": "{text}", "source": {"file_id": record.upload()}}
        record.ask("POST /v1/jobs", json=body)
        record.ask("POST /v1/estimate", json=body)
        file = record.upload(line("a", "x") + line("b", "x"), "b.jsonl", "batch")
        record.ask("POST /v1/batches", json={"input_file_id": file, "endpoint": CHAT, "completion_window": "24h"})
        for warehouse in WAREHOUSES:
            record.ask(f"POST /v1/dialects/{warehouse}/complete", json={"data": "x" * 1_000})
        bomb = gzip.compress(b"x" * 10_000, mtime=0)
        headers = {"Content-Encoding": "gzip", "sf-external-function-query-batch-id": "b"}
        record.ask("POST /v1/dialects/snowflake/complete", content=bomb, headers=headers)
        keys = running.state.keys
        rated, poor = keys.create("rated", "ann"), keys.create("poor", "bob")
        keys.limit_tenant("rated", 2)  # a token in half a minute, so that none comes back meanwhile
        keys.set_daily_budget("poor", Decimal("0.000001"))
        http.headers["Authorization"] = f"Bearer {rated}"
        record.ask("POST /v1/chat/completions", json=user("one", max_tokens=2))
        record.ask("POST /v1/chat/completions", json=user("one two three four five six", max_tokens=8))
        record.exchanges[-1] = json.loads(
            re.sub(r"in \d+ s|(?<=retry-after\": \")\d+", "<wait>", json.dumps(record.exchanges[-1]))
        )
        http.headers["Authorization"] = f"Bearer {poor}"
        record.ask("POST /v1/chat/completions", json=user("one two three"))
        record.check("limits")


@contextmanager
def worker(engines: EngineHost, secret: str) -> Iterator[httpx.Client]:
    """A client of a worker's own address."""
    internal = serve_internal(engines, "127.0.0.1", secret)
    with httpx.Client(base_url=internal.address) as http:
        yield http
    internal.close()
    engines.close()


def test_the_api_of_workers(tmp_path: Path, models_file: Path) -> None:
    secret = internal_secret(None, tmp_path / "home")
    with worker(EngineHost(ServiceState(tmp_path / "home", models_file, Moody())), secret) as http:
        record = Recorder(http)
        chat = "POST /v1/chat/completions"
        for headers in ({}, {"authorization": "Bearer nonsense"}):
            record.ask(chat, json=user("x"), headers=headers)
        http.headers["authorization"] = f"Bearer {secret}"
        record.ask(chat, json=user("x"))
        http.headers.update({"x-complete-tenant": "acme", "x-complete-user": "ann"})
        record.ask(chat, json=user("one two"))
        record.ask(chat, json=user("one two", stream=True))
        record.ask(chat, json=user("bad"))
        record.ask("POST /v1/completions", json={"model": "echo", "prompt": "one", "temperature": 0})
        for request in ("GET /v1/models", "GET /v1/files", "GET /v1/jobs", "GET /healthz", "GET /openapi.json"):
            record.ask(request)
        record.check("worker_api")


def test_a_service_without_a_worker(queued: Recorder) -> None:
    queued.ask("POST /v1/chat/completions", json=user("x"))
    queued.ask("POST /v1/completions", json={"model": "echo", "prompt": "x", "stream": True})
    queued.ask("GET /readyz")
    queued.check("no_worker")


def test_the_openapi_document(working: Running) -> None:
    with working.http() as http:
        found = http.get("/openapi.json").json()
    # FastAPI's versions write their own schemas and those of forms differently; files.json has what the form takes.
    for name in ("HTTPValidationError", "ValidationError", "Body_upload_file_v1_files_post"):
        assert found["components"]["schemas"].pop(name)
    assert found["info"].pop("version") == __version__
    check_golden("api/openapi.json", json.dumps(found, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def test_every_golden_file_has_its_test() -> None:
    check_names("api/*.json", [f"{name}.json" for name in (*FAMILIES, *(f"call_outs_{name}" for name in WAREHOUSES))])


@pytest.mark.skipif(rewriting(), reason="the golden files are only being written")
def test_every_route_is_asked(working: Running) -> None:
    with working.http() as http:
        paths = http.get("/openapi.json").json()["paths"]
    text = "".join(
        path.read_text("utf-8") for path in sorted((GOLDEN / "api").glob("*.json")) if path.stem != "openapi"
    )
    asked = set(re.findall(r'"request": "(\w+) ([^"?]+)"', text))
    for path, methods in paths.items():
        form = re.compile(re.sub(r"\{\w+\}", "[^/]+", path))
        for method in methods:
            assert any(m == method.upper() and form.fullmatch(p) for m, p in asked), f"{method.upper()} {path}"
