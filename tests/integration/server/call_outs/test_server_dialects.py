"""Call-outs of warehouses over HTTP: recorded requests, replays, bad input. No row is computed twice."""

from __future__ import annotations

import base64
import gc
import gzip
import hashlib
import json
import subprocess
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa

from complete_fn import Completion, CompletionRequest, EchoEngine
from complete_fn.errors import EngineError
from complete_fn.host import here, process_started
from complete_fn.server.call_out_replies import dialect_of
from complete_fn.service.call_out_batches import CallOutName
from complete_fn.service.retention import expire
from complete_fn.store.job_tables import call_outs
from complete_fn.store.tables import ledger
from tests.integration.server.conftest import Running

GOLDEN = Path(__file__).parents[3] / "golden" / "dialects"
WAREHOUSES = ("snowflake", "bigquery", "redshift")
BATCH = {"snowflake": "sf-external-function-query-batch-id", "redshift": "complete-batch-id"}


class Counting(EchoEngine):
    """Counts what it computes; with a gate, holds every row until it is opened."""

    def __init__(self, gate: threading.Event | None = None) -> None:
        super().__init__(64)
        self.gate, self.asked, self.streams = gate, [], 0  # type: ignore[var-annotated]

    def stream(self, requests: Iterable[CompletionRequest], tenant: str) -> Iterator[tuple[int, Completion]]:
        self.streams += 1
        for n, request in enumerate(requests):
            while self.gate is not None and not self.gate.wait(0.05):
                pass
            self.asked.append(request.prompt)
            yield n, self.complete(request)


def recorded(warehouse: str, name: str = "request") -> Any:
    return json.loads((GOLDEN / warehouse / f"{name}.json").read_text())


def body(warehouse: str, rows: list[list[Any]], batch: str = "b1") -> tuple[dict[str, Any], dict[str, str]]:
    """A request of the warehouse's form with other rows in it, and its headers."""
    request, headers = recorded(warehouse), dict(recorded(warehouse, "headers"))
    if warehouse == "snowflake":
        headers[BATCH[warehouse]] = batch
        return {"data": [[n, *row] for n, row in enumerate(rows)]}, headers
    if warehouse == "bigquery":
        return {**request, "requestId": batch, "calls": rows}, headers
    return {**request, "request_id": batch, "num_records": len(rows), "arguments": rows}, headers


def values(warehouse: str, reply: httpx.Response) -> list[Any]:
    found = reply.json()
    if warehouse == "snowflake":
        return [row[1] for row in found["data"]]
    return list(found["replies"] if warehouse == "bigquery" else found["results"])


def post(
    running: Running,
    warehouse: str,
    rows: list[list[Any]],
    batch: str = "b1",
    key: str = "",
    function: str = "complete",
) -> httpx.Response:
    request, headers = body(warehouse, rows, batch)
    with running.http(key) as http:
        return http.post(f"/v1/dialects/{warehouse}/{function}", json=request, headers=headers)


def billed(running: Running, tenant: str = "local") -> int:
    sums = sa.select(sa.func.sum(ledger.c.tokens)).where(
        ledger.c.tenant == tenant, ledger.c.price_class.in_(("input", "cached_input", "output"))
    )
    with running.state.store.read() as connection:
        return connection.execute(sums).scalar() or 0


@pytest.mark.parametrize("warehouse", WAREHOUSES)
def test_a_recorded_request_gets_the_recorded_reply(shared: Running, warehouse: str) -> None:
    with shared.http() as http:
        reply = http.post(
            f"/v1/dialects/{warehouse}/complete",
            content=(GOLDEN / warehouse / "request.json").read_bytes(),
            headers=recorded(warehouse, "headers"),
        )
    assert (reply.status_code, reply.json()) == (200, recorded(warehouse, "reply"))
    if warehouse == "snowflake":
        assert reply.headers["content-md5"] == base64.b64encode(hashlib.md5(reply.content).digest()).decode()


@pytest.mark.parametrize("warehouse", WAREHOUSES)
def test_row_errors_travel_inside_the_value(shared: Running, warehouse: str) -> None:
    rows: list[list[Any]] = [["echo", "fine"], ["echo", "word " * 100], [None, "x"]]
    assert values(warehouse, post(shared, warehouse, rows, "plain")) == ["fine", None, None]
    found = values(warehouse, post(shared, warehouse, rows, "typed", function="complete_details"))
    typed = [json.loads(v) if isinstance(v, str) else v for v in found]
    assert typed[2] is None
    assert typed[0]["value"] == "fine"
    assert typed[0]["error"] is None
    known = {"value", "error", "finish_reason", "usage", "cost", "source", "scores", "field_order"}
    assert set(typed[0]) == known
    assert typed[1]["error"]["code"] == "prompt_too_long"


@pytest.mark.parametrize("warehouse", WAREHOUSES)
def test_a_batch_that_is_sent_again_costs_nothing(serve: Callable[..., Running], warehouse: str) -> None:
    engine = Counting()
    running = serve(engine=engine)
    rows = [["echo", f"row {n}", {"temperature": 0.7, "seed": n}] for n in range(20)]
    first = post(running, warehouse, rows)
    paid = billed(running)
    assert len(engine.asked) == 20
    assert paid > 0
    again = [post(running, warehouse, rows) for _ in range(3)]
    assert {r.content for r in again} == {first.content}
    assert len(engine.asked) == 20
    assert billed(running) == paid


@pytest.mark.parametrize("warehouse", WAREHOUSES)
def test_reordered_and_split_batches_compute_no_row_twice(serve: Callable[..., Running], warehouse: str) -> None:
    engine = Counting()
    running = serve(engine=engine)
    rows = [["echo", f"row {n}"] for n in range(20)]
    whole = values(warehouse, post(running, warehouse, rows, "whole"))
    assert whole == [f"row {n}" for n in range(20)]
    assert values(warehouse, post(running, warehouse, rows[::-1], "reordered")) == whole[::-1]
    split = [values(warehouse, post(running, warehouse, rows[n : n + 7], f"split {n}")) for n in (0, 7, 14)]
    assert [v for part in split for v in part] == whole
    assert sorted(engine.asked) == sorted(f"row {n}" for n in range(20))


def test_row_numbers_go_back_as_they_came(shared: Running) -> None:
    headers = {**recorded("snowflake", "headers"), BATCH["snowflake"]: "numbers"}
    content = {"data": [[7, "echo", "seven"], [2, "echo", "two"]]}
    with shared.http() as http:
        reply = http.post("/v1/dialects/snowflake/complete", json=content, headers=headers)
    assert reply.json() == {"data": [[7, "seven"], [2, "two"]]}


@pytest.mark.parametrize("warehouse", ["snowflake", "redshift"])
def test_a_slow_batch_is_polled(serve: Callable[..., Running], monkeypatch: pytest.MonkeyPatch, warehouse: str) -> None:
    monkeypatch.setattr(dialect_of(warehouse), "patience", 0.2)
    gate = threading.Event()
    engine = Counting(gate)
    running = serve(engine=engine)
    rows = [["echo", f"row {n}"] for n in range(5)]
    path, headers = f"/v1/dialects/{warehouse}/complete", {BATCH[warehouse]: "slow"}
    assert post(running, warehouse, rows, "slow").status_code == 202
    with running.http() as http:
        assert http.get(path, headers=headers).status_code == 202
        assert post(running, warehouse, rows, "slow").status_code == 202  # sent again while it runs
        gate.set()
        until = time.monotonic() + 60
        while (reply := http.get(path, headers=headers)).status_code == 202 and time.monotonic() < until:
            pass
        assert values(warehouse, reply) == [f"row {n}" for n in range(5)]
        assert http.get(path, headers=headers).content == reply.content  # polled after the end
        assert post(running, warehouse, rows, "slow").content == reply.content
        unknown = http.get(path, headers={BATCH[warehouse]: "never sent"})
        assert unknown.status_code == 400
        assert "never sent" in unknown.text
    assert len(engine.asked) == 5


@pytest.fixture
def elsewhere(serve: Callable[..., Running]) -> Iterator[tuple[Running, subprocess.Popen[bytes], CallOutName]]:
    """A service whose batch `b1` is run by another process, that process, and the batch's name."""
    running = serve(engine=Counting())
    with subprocess.Popen(["sleep", "60"]) as other:
        name = CallOutName("local", "local", "redshift", "complete", "b1")
        row = {
            "tenant": name.tenant,
            "dialect": name.dialect,
            "batch": name.key,
            "digest": hashlib.sha256(json.dumps([[["echo", "x"]], []]).encode()).digest(),
            "status": "running",
            "holder": f"{here()}|{other.pid}|{process_started(other.pid)}|0",
            "asked": zlib.compress(json.dumps({"batch": "b1", "rows": [["echo", "x"]]}).encode()),
            "created_at": time.time(),
        }
        with running.state.store.write() as connection:
            connection.execute(call_outs.insert().values(row))
        yield running, other, name
        other.kill()


def test_who_asks_for_a_batch_of_another_process_is_not_sent_away_at_once(
    elsewhere: tuple[Running, subprocess.Popen[bytes], CallOutName], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dialect_of("redshift"), "patience", 1.0)
    running, _, _ = elsewhere
    with running.http() as http:
        for ask in (
            lambda: post(running, "redshift", [["echo", "x"]]),
            lambda: http.get("/v1/dialects/redshift/complete", headers={BATCH["redshift"]: "b1"}),
        ):
            began = time.monotonic()
            assert ask().status_code == 202
            assert time.monotonic() - began >= 1.0


@pytest.mark.parametrize(("how", "value"), [("done", "of the other"), ("killed", "x")])
def test_who_asks_for_a_batch_of_another_process_gets_its_values(
    elsewhere: tuple[Running, subprocess.Popen[bytes], CallOutName],
    monkeypatch: pytest.MonkeyPatch,
    how: str,
    value: str,
) -> None:
    monkeypatch.setattr("complete_fn.server.routes.call_outs.LOOK_SECONDS", 0.1)
    running, other, name = elsewhere
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(post, running, "redshift", [["echo", "x"]])
        time.sleep(0.5)
        assert not asked.done()
        if how == "done":
            reply = zlib.compress(json.dumps([[], [value]]).encode())
            with running.state.store.write() as connection:
                connection.execute(call_outs.update().where(name.row).values(status="done", reply=reply))
        else:
            other.kill()
            other.wait()
        assert values("redshift", asked.result(60)) == [value]


def test_a_batch_that_was_cut_off_by_the_end_of_the_service_is_begun_again(
    serve: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dialect_of("snowflake"), "patience", 0.2)
    first = serve(engine=Counting(threading.Event()))
    rows = [["echo", "one"], ["echo", "two"]]
    assert post(first, "snowflake", rows, "cut").status_code == 202
    first.end()
    engine = Counting()
    second = serve(engine=engine)
    with second.http() as http:
        until = time.monotonic() + 60
        while time.monotonic() < until:
            reply = http.get("/v1/dialects/snowflake/complete", headers={BATCH["snowflake"]: "cut"})
            if reply.status_code == 200:
                break
    assert values("snowflake", reply) == ["one", "two"]
    assert sorted(engine.asked) == ["one", "two"]


@pytest.mark.parametrize("warehouse", WAREHOUSES)
def test_a_reply_that_was_cut_off_is_fetched_again(serve: Callable[..., Running], warehouse: str) -> None:
    engine = Counting()
    running = serve(engine=engine)
    rows = [["echo", "long " * 10 + str(n)] for n in range(50)]
    request, headers = body(warehouse, rows, "cut")
    with (
        running.http() as http,
        http.stream("POST", f"/v1/dialects/{warehouse}/complete", json=request, headers=headers) as reply,
    ):
        next(reply.iter_raw(16))  # and hang up
    assert values(warehouse, post(running, warehouse, rows, "cut")) == [row[1] for row in rows]
    assert len(engine.asked) == 50


def test_small_requests_that_arrive_together_become_few_runs(serve: Callable[..., Running]) -> None:
    engine = Counting()
    running = serve(engine=engine)
    with ThreadPoolExecutor(32) as pool:
        replies = list(pool.map(lambda n: post(running, "bigquery", [["echo", f"row {n}"]], f"r{n}"), range(64)))
    assert [values("bigquery", r) for r in replies] == [[f"row {n}"] for n in range(64)]
    assert len(engine.asked) == 64
    assert engine.streams < 40


def test_tenants_share_no_batch_and_no_answer(serve: Callable[..., Running]) -> None:
    engine = Counting()
    running = serve(engine=engine)
    a, a2, b = (running.state.keys.create(t, u) for t, u in (("a", "ann"), ("a", "abe"), ("b", "bob")))
    rows = [["echo", "secret"]]
    assert post(running, "snowflake", rows, "same", key=a).status_code == 200
    assert post(running, "redshift", rows, "same", key=a2).status_code == 200
    assert len(engine.asked) == 1
    assert post(running, "snowflake", rows, "same", key=b).status_code == 200
    assert len(engine.asked) == 2
    assert billed(running, "a") == billed(running, "b") > 0
    with running.http(b) as http:
        found = http.get("/v1/dialects/redshift/complete", headers={BATCH["redshift"]: "same"})
    assert found.status_code == 400


BAD: list[tuple[list[list[Any]], str]] = [
    ([["echo"]], "Row 0 has 1 arguments"),
    ([["echo", "x"], ["echo", "x", {}, 1]], "Row 1 has 4 arguments"),
    ([["no-such-model", "x"]], "'no-such-model' is not in this service's catalogue"),
    ([["echo", "x", {"temperature": 9}]], "temperature = 9 must be a number"),
    ([["echo", "x", "not json"]], "the options are no JSON object"),
    ([["echo", {"a": 1}]], "the prompt is an object"),
    ([[5, "x"]], "the model is a number"),
    ([["echo", "x", {"strict": True}]], "'strict' is no option here"),
]


@pytest.mark.parametrize("warehouse", WAREHOUSES)
@pytest.mark.parametrize(("rows", "message"), BAD)
def test_a_query_fault_is_told_once_and_for_all(
    shared: Running, warehouse: str, rows: list[list[Any]], message: str
) -> None:
    reply = post(shared, warehouse, rows, "bad")
    assert reply.status_code == 400
    found = reply.json()
    place = {"snowflake": "error", "bigquery": "errorMessage", "redshift": "error_msg"}[warehouse]
    assert message in found[place]


@pytest.mark.parametrize("warehouse", WAREHOUSES)
@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"{}", b'{"data": 5, "calls": 5, "arguments": 5}', b"\xff\xfe"])
def test_a_body_of_no_form_is_refused(shared: Running, warehouse: str, content: bytes) -> None:
    with shared.http() as http:
        headers = recorded(warehouse, "headers")
        assert http.post(f"/v1/dialects/{warehouse}/complete", content=content, headers=headers).status_code == 400


@pytest.mark.parametrize("warehouse", WAREHOUSES)
def test_wrong_keys_and_oversized_bodies_are_refused(serve: Callable[..., Running], warehouse: str) -> None:
    running = serve()
    huge = [["echo", "x" * (17 * 1024 * 1024)]]
    place = {"snowflake": "error", "bigquery": "errorMessage", "redshift": "error_msg"}[warehouse]
    too_large = post(running, warehouse, huge)
    assert too_large.status_code == (400 if warehouse == "bigquery" else 413)
    assert "larger than this service takes" in too_large.json()[place]
    zipped = gzip.compress(json.dumps(body(warehouse, huge)[0]).encode(), 1)
    with running.http() as http:
        headers = {**body(warehouse, huge)[1], "Content-Encoding": "gzip"}
        bomb = http.post(f"/v1/dialects/{warehouse}/complete", content=zipped, headers=headers)
        assert bomb.status_code == (400 if warehouse == "bigquery" else 413)
        small = gzip.compress(json.dumps(body(warehouse, [["echo", "hi"]])[0]).encode())
        fine = http.post(f"/v1/dialects/{warehouse}/complete", content=small, headers=headers)
        assert values(warehouse, fine) == ["hi"]
    running.state.keys.create("a", "ann")
    strange = post(running, warehouse, [["echo", "x"]], key="cfn-wrong")
    assert strange.status_code == 401
    assert "API key" in strange.json()[place]
    only_usage = running.state.keys.create("a", "ann", ["usage"])
    assert post(running, warehouse, [["echo", "x"]], key=only_usage).status_code == 403


@pytest.mark.parametrize(("warehouse", "status"), [("snowflake", 429), ("bigquery", 503), ("redshift", 429)])
def test_rate_limits_hold_for_batches_and_not_for_their_repetition(
    serve: Callable[..., Running], warehouse: str, status: int
) -> None:
    running = serve(engine=Counting())
    key = running.state.keys.create("acme", "ann")
    running.state.keys.limit_tenant("acme", 20)  # tokens a minute
    large = [["echo", f"row {n}"] for n in range(20)]  # may need far more: let in once, as the bucket is full
    assert post(running, warehouse, large, "first", key=key).status_code == 200
    assert post(running, warehouse, large, "first", key=key).status_code == 200
    refused = post(running, warehouse, [["echo", "other"]], "second", key=key)
    assert refused.status_code == status
    assert int(refused.headers["retry-after"]) > 5  # the limit's own wait
    assert "tokens a minute" in refused.text


def test_a_batch_that_fails_after_its_request_is_no_surprise(
    serve: Callable[..., Running], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(dialect_of("snowflake"), "patience", 0.1)
    running = serve(engine=Counting(threading.Event()))
    path, headers = "/v1/dialects/snowflake/complete", {BATCH["snowflake"]: "gone"}
    assert post(running, "snowflake", [["echo", "x"]], "gone").status_code == 202
    with running.http() as http:
        assert http.delete(path, headers=headers).status_code == 204
    running.end()
    gc.collect()
    assert "never retrieved" not in caplog.text


def test_a_batch_name_belongs_to_one_body(shared: Running) -> None:
    assert post(shared, "snowflake", [["echo", "x"]], "one name").status_code == 200
    other = post(shared, "snowflake", [["echo", "y"]], "one name")
    assert other.status_code == 400
    assert "one name" in other.json()["error"]


@pytest.mark.parametrize(("warehouse", "status"), [("snowflake", 429), ("bigquery", 503), ("redshift", 429)])
def test_a_crowd_is_sent_away_early(
    serve: Callable[..., Running], monkeypatch: pytest.MonkeyPatch, warehouse: str, status: int
) -> None:
    running = serve()
    monkeypatch.setattr("complete_fn.service.call_out_merging.WAITING", 0)
    reply = post(running, warehouse, [["echo", "x"]])
    assert reply.status_code == status
    if warehouse != "redshift":
        assert int(reply.headers["retry-after"]) > 0
    monkeypatch.undo()
    assert values(warehouse, post(running, warehouse, [["echo", "x"]])) == ["x"]  # the same batch, once there is room


class Breaking(Counting):
    """Breaks off once, before the row of this number."""

    def __init__(self, before: int) -> None:
        super().__init__()
        self.before: int | None = before

    def stream(self, requests: Iterable[CompletionRequest], tenant: str) -> Iterator[tuple[int, Completion]]:
        for n, outcome in super().stream(requests, tenant):
            if n == self.before:
                self.before = None
                raise EngineError("the engine died")
            yield n, outcome


@pytest.mark.parametrize("options", [{"temperature": 0.7}, {"cache": "off"}, {"cache": "refresh"}])
def test_a_batch_begun_again_pays_only_for_the_rest_of_rows_that_no_other_may_have(
    serve: Callable[..., Running], options: dict[str, Any]
) -> None:
    running = serve(engine=Breaking(80))
    rows = [["echo", f"row {n}", options] for n in range(100)]
    assert post(running, "snowflake", rows).status_code >= 500
    assert values("snowflake", post(running, "snowflake", rows)) == [f"row {n}" for n in range(100)]
    assert billed(running) == 100 * 4  # two tokens in, two out
    assert post(running, "snowflake", rows, "another").status_code == 200
    assert billed(running) == 200 * 4


def test_a_batch_is_forgotten_after_its_hours_though_no_other_comes(serve: Callable[..., Running]) -> None:
    running = serve(engine=Counting())
    rows = [["echo", "patient Smith", {"cache": "off"}]]
    assert post(running, "snowflake", rows).status_code == 200
    with running.state.store.write() as connection:
        connection.execute(call_outs.update().values(created_at=time.time() - 13 * 3600))
    assert post(running, "snowflake", rows).status_code == 200  # it is begun again, not read
    with running.state.store.write() as connection:
        connection.execute(call_outs.update().values(created_at=time.time() - 13 * 3600))
    expire(running.state)
    with running.state.store.read() as connection:
        assert connection.execute(sa.select(call_outs)).all() == []
    assert billed(running) == 2 * 4
