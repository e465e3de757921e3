"""Jobs over uploaded tables through the API: answers, counts, money, cancelling, deleting, what is refused."""

from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
import pytest
import sqlalchemy as sa
from pyarrow import parquet

from complete_fn import EchoEngine
from complete_fn.errors import EngineError
from complete_fn.service.state import Limits
from complete_fn.store.tables import answers, ledger
from complete_fn.types import Completion, CompletionRequest

ROWS = [{"id": n, "text": f"word {n % 7}" if n % 10 else None} for n in range(100)]


def parquet_bytes(rows: list[dict[str, Any]]) -> bytes:
    sink = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


def upload(client: httpx.Client, content: bytes, name: str = "rows.parquet") -> str:
    reply = client.post("/v1/files", files={"file": (name, content)}, data={"purpose": "user_data"})
    assert reply.status_code == 200, reply.text
    return str(reply.json()["id"])


def submit(client: httpx.Client, file: str, **more: Any) -> dict[str, Any]:
    body = {"model": "echo", "prompt": "Say: {text}", "source": {"file_id": file}, **more}
    reply = client.post("/v1/jobs", json=body)
    assert reply.status_code == 201, reply.text
    found: dict[str, Any] = reply.json()
    return found


def wait(client: httpx.Client, job: str, until: tuple[str, ...] = ("completed",)) -> dict[str, Any]:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        found: dict[str, Any] = client.get(f"/v1/jobs/{job}").json()
        if found["status"] in until:
            return found
        time.sleep(0.05)
    raise AssertionError(found)


def results(client: httpx.Client, job: str, **query: Any) -> list[dict[str, Any]]:
    reply = client.get(f"/v1/jobs/{job}/results", params=query)
    assert reply.status_code == 200, reply.text
    return list(parquet.read_table(io.BytesIO(reply.content)).to_pylist())


def test_a_job_answers_every_row_in_order_and_bills_each_prompt_once(serve: Callable[..., Any]) -> None:
    engine = EchoEngine(64)
    running = serve(engine)
    with running.http() as client:
        job = wait(client, submit(client, upload(client, parquet_bytes(ROWS)), query_tag="t")["id"])
        rows = results(client, job["id"], details=True)
    assert [r["id"] for r in rows] == list(range(100))
    assert [r["completion"] for r in rows] == [r["text"] and f"Say: {r['text']}" for r in ROWS]
    assert job["rows"] == {"total": 100, "done": 100, "failed": 0, "null": 10}
    assert len(engine.requests) == 7  # distinct prompts
    assert job["usage"] == {"prompt_tokens": 21, "cached_tokens": 0, "completion_tokens": 21}
    assert Decimal(job["cost"]["amount"]) == Decimal(21 * 1 + 21 * 2) / 1_000_000
    paid = sum(r["completion_details"]["cost"] for r in rows if r["completion_details"])
    assert paid == Decimal(job["cost"]["amount"])
    assert {r["completion_details"]["source"] for r in rows if r["completion_details"]} == {"computed", "duplicate"}
    with running.state.store.read() as connection:
        assert set(connection.execute(sa.select(ledger.c.query_tag)).scalars()) == {"t"}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.csv", b"id,text\n1,a\n2,\n3,c c\n"),
        ("t.jsonl", b'{"id":"1","text":"a"}\n{"id":"2"}\n{"id":"3","text":"c c"}\n'),
    ],
)
def test_csv_and_jsonl_in_jsonl_csv_and_arrow_out(running: Any, name: str, content: bytes) -> None:
    with running.http() as client:
        job = wait(client, submit(client, upload(client, content, name), prompt="{text}", column="said")["id"])["id"]
        url = f"/v1/jobs/{job}/results"
        lines = client.get(url, params={"format": "jsonl"}).text.splitlines()
        assert client.get(url, params={"format": "csv"}).text.splitlines()[3] == "3,c c,c c"
        arrow = pa.ipc.open_stream(client.get(url, params={"format": "arrow"}).content).read_all()
    assert [json.loads(line)["said"] for line in lines] == ["a", None, "c c"]
    assert arrow.column("said").to_pylist() == ["a", None, "c c"]


def test_a_second_job_on_the_same_rows_costs_nothing(running: Any) -> None:
    with running.http() as client:
        file = upload(client, parquet_bytes(ROWS))
        first = wait(client, submit(client, file)["id"])
        again = wait(client, submit(client, file)["id"])
    assert Decimal(first["cost"]["amount"]) > 0
    assert Decimal(again["cost"]["amount"]) == 0
    assert again["rows"] == first["rows"]


def test_an_idempotency_key_makes_one_job(running: Any) -> None:
    with running.http() as client:
        file = upload(client, parquet_bytes(ROWS))
        first = submit(client, file, idempotency_key="k")
        assert submit(client, file, idempotency_key="k")["id"] == first["id"]
        body = {"model": "echo", "prompt": "Other: {text}", "source": {"file_id": file}}
        other = client.post("/v1/jobs", json=body, headers={"Idempotency-Key": "k"})
        assert other.status_code == 409
        assert len(client.get("/v1/jobs").json()["data"]) == 1
    folders = list((running.state.folder / "jobs").iterdir())
    assert [f.name for f in folders] == [first["id"]]


def test_failed_rows_are_null_and_say_why(running: Any) -> None:
    rows = [{"text": "short"}, {"text": "w " * 100}]
    with running.http() as client:
        job = wait(client, submit(client, upload(client, parquet_bytes(rows)))["id"])
        found = results(client, job["id"], details=True)
    assert job["rows"]["failed"] == 1
    assert [r["completion"] for r in found] == ["Say: short", None]
    assert found[1]["completion_details"]["error"]["code"] == "prompt_too_long"


def test_max_cost_is_never_passed(running: Any) -> None:
    rows = [{"text": f"row {n}"} for n in range(50)]
    options = {"max_tokens": 2}
    with running.http() as client:
        cap = Decimal("0.000200")
        job = wait(
            client, submit(client, upload(client, parquet_bytes(rows)), options=options, max_cost=str(cap))["id"]
        )
        found = results(client, job["id"], details=True)
    # A row costs 3 + 2 x 2 = 7 millionths and reserves 64 + 2 x 2 = 68: the spending stops within one reservation.
    assert cap - Decimal("0.000068") < Decimal(job["cost"]["amount"]) <= cap
    codes = {r["completion_details"]["error"]["code"] for r in found if r["completion_details"]["error"]}
    assert codes == {"budget_exceeded"}
    assert job["rows"]["failed"] == 50 - int(Decimal(job["cost"]["amount"]) / Decimal("0.000007"))


class Slow(EchoEngine):
    """A row takes a while; the stream's end is noted."""

    def __init__(self, seconds: float = 0.02) -> None:
        super().__init__(64)
        self.seconds = seconds
        self.closed = threading.Event()

    def stream(self, requests: Iterable[CompletionRequest], tenant: str) -> Iterator[tuple[int, Completion]]:
        try:
            for found in super().stream(requests, tenant):
                time.sleep(self.seconds)
                yield found
        finally:
            self.closed.set()


def test_cancelling_stops_the_engine_and_keeps_and_bills_what_is_done(serve: Callable[..., Any]) -> None:
    engine = Slow()
    running = serve(engine)
    rows = [{"text": f"row {n}"} for n in range(2000)]
    with running.http() as client:
        job = submit(client, upload(client, parquet_bytes(rows)))["id"]
        while len(engine.requests) < 100:
            time.sleep(0.05)
        before = len(engine.requests)
        assert client.get(f"/v1/jobs/{job}/results").status_code == 409
        assert client.delete(f"/v1/jobs/{job}").status_code == 409
        assert client.post(f"/v1/jobs/{job}/cancel").json()["status"] in ("stopping", "cancelled")
        ended = wait(client, job, ("cancelled",))
        assert engine.closed.wait(60)
        asked = len(engine.requests)
        assert asked - before < 5 / engine.seconds  # five seconds of a busy machine's own time
        found = results(client, job, details=True)
        assert client.post(f"/v1/jobs/{job}/cancel").status_code == 409
    done = [r for r in found if r["completion"] is not None]
    assert 50 < len(done) <= asked < 2000
    assert {r["completion_details"]["error"]["code"] for r in found if r["completion"] is None} == {"cancelled"}
    assert Decimal(ended["cost"]["amount"]) == len(done) * Decimal(9) / 1_000_000
    time.sleep(0.3)
    assert len(engine.requests) == asked


def test_a_service_that_ends_gives_its_parts_back_and_the_next_goes_on(serve: Callable[..., Any]) -> None:
    slow, quick = Slow(), Slow(0)
    rows = [{"text": f"row {n}"} for n in range(400)]
    first = serve(slow)
    with first.http() as client:
        job = submit(client, upload(client, parquet_bytes(rows)), options={"temperature": 0.5})["id"]
        while client.get(f"/v1/jobs/{job}").json()["rows"]["done"] < 64:
            time.sleep(0.05)
    first.end()
    running = serve(quick)
    with running.http() as client:
        ended = wait(client, job)
        assert [r["completion"] for r in results(client, job)] == [f"Say: row {n}" for n in range(400)]
        (part,) = running.state.jobs.parts(job)
    assert part.tries == 0
    # What the first had committed was not computed again, though sampled answers are never shared.
    assert 64 <= 400 - len(quick.requests) <= len(slow.requests)
    assert Decimal(ended["cost"]["amount"]) == 400 * Decimal(9) / 1_000_000


def test_rows_that_are_done_can_be_fetched_before_the_job_is_over(
    serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("complete_fn.service.job_files.PART_TOKENS", 400)
    engine = Slow(0.05)
    with serve(engine).http() as client:
        job = submit(client, upload(client, parquet_bytes([{"n": n, "text": f"row {n}"} for n in range(400)])))["id"]
        while not (found := results(client, job, partial=True)):
            time.sleep(0.1)
        state = client.get(f"/v1/jobs/{job}").json()
        assert 0 < len(found) < 400
        assert all(r["completion"] == f"Say: row {r['n']}" for r in found)
        assert state["status"] == "running"
        assert state["eta_seconds"] > 0
        client.post(f"/v1/jobs/{job}/cancel")
        wait(client, job, ("cancelled",))


def test_deleting_leaves_the_ledger_and_nothing_with_text(running: Any) -> None:
    with running.http() as client:
        file = upload(client, parquet_bytes(ROWS))
        job = wait(client, submit(client, file)["id"])["id"]
        assert client.delete(f"/v1/files/{file}").json()["deleted"]
        assert client.get(f"/v1/files/{file}").status_code == 404
        assert len(results(client, job)) == 100  # the job keeps its own copy
        assert client.delete(f"/v1/jobs/{job}").status_code == 200
        assert client.get(f"/v1/jobs/{job}").status_code == 404
    store = running.state.store
    with store.read() as connection:
        assert connection.execute(sa.select(sa.func.count()).select_from(answers)).scalar() == 0
        assert connection.execute(sa.select(sa.func.sum(ledger.c.tokens))).scalar() > 0
    left = [p for p in running.state.folder.rglob("*") if p.is_file()]
    assert left == []


def test_an_engine_that_cannot_work_fails_the_job_after_three_tries(serve: Callable[..., Any]) -> None:
    class Dead(EchoEngine):
        tries = 0

        def stream(self, requests: Iterable[CompletionRequest], tenant: str) -> Iterator[tuple[int, Completion]]:
            Dead.tries += 1
            raise EngineError("No memory left.\nand a log with secrets")

    running = serve(Dead())
    with pytest.MonkeyPatch.context() as patch, running.http() as client:
        patch.setattr("complete_fn.worker.part_runner.RETRY_SECONDS", 0.0)
        patch.setattr("complete_fn.worker.loop.IDLE_SECONDS", 0.05)
        job = wait(client, submit(client, upload(client, parquet_bytes(ROWS)))["id"], ("failed",))
    assert Dead.tries == 3
    assert job["error"] == "No memory left."


@pytest.mark.parametrize(
    ("change", "status", "words"),
    [
        ({"model": "/etc"}, 404, "catalogue"),
        ({"prompt": "{nothing}"}, 400, "no column"),
        ({"prompt": "{text.__class__}"}, 400, "only {name}"),
        ({"prompt": "no field"}, 400, "names no"),
        ({"column": "id"}, 400, "already has"),
        ({"options": {"temprature": 1}}, 400, "Did you mean 'temperature'"),
        ({"options": {"strict": True}}, 400, "strict"),
        ({"max_cost": "much"}, 400, "not a number"),
        ({"max_cost": "1e18"}, 400, "at most 9,000,000,000"),
        ({"max_cost": "1e400"}, 400, "at most"),
        ({"max_cost": "1e20000000"}, 400, "at most"),
        ({"source": {"file_id": "../../state.sqlite3"}}, 404, "no file"),
        ({"source": {"uri": "http://localhost/x.csv"}}, 400, "under no root"),
        ({"source": {"file_id": "x", "uri": "file:///etc/passwd"}}, 400, "'source' takes"),
    ],
)
def test_what_cannot_run_is_refused_at_once(shared: Any, change: dict[str, Any], status: int, words: str) -> None:
    folder = shared.state.folder / "jobs"
    with shared.http() as client:
        jobs, folders = client.get("/v1/jobs").json()["data"], set(folder.glob("*"))
        body = {"model": "echo", "prompt": "{text}", "source": {"file_id": upload(client, parquet_bytes(ROWS))}}
        reply = client.post("/v1/jobs", json={**body, **change})
        assert reply.status_code == status
        assert words in reply.json()["error"]["message"]
        assert [job["id"] for job in client.get("/v1/jobs").json()["data"]] == [job["id"] for job in jobs]
    assert set(folder.glob("*")) <= folders


@pytest.mark.parametrize(
    ("name", "content", "status"),
    [
        ("rows.parquet", b"PAR1 broken PAR1", 400),
        ("rows.jsonl", b'{"text": 1}\n[2]\n', 400),
        ("rows.jsonl", b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n", 400),
        ("rows.csv", b"", 400),
        ("rows.parquet", parquet_bytes([{"text": "x" * 30_000} for _ in range(100)]), 413),  # a bomb: 3 MB in a few kB
        ("rows.csv", b"text\n" + b"a\n" * 1_001, 413),
    ],
)
def test_tables_that_are_broken_or_too_large_are_refused(
    serve: Callable[..., Any], name: str, content: bytes, status: int
) -> None:
    running = serve(limits=Limits(table_bytes=1_000_000, job_rows=1_000))
    with running.http() as client:
        body = {"model": "echo", "prompt": "{text}", "source": {"file_id": upload(client, content, name)}}
        reply = client.post("/v1/jobs", json=body)
    assert reply.status_code == status, reply.text
    assert str(running.state.folder) not in reply.text


def test_uploads_are_bounded_and_named_by_us(serve: Callable[..., Any]) -> None:
    running = serve(limits=Limits(upload_bytes=200_000))
    with running.http() as client:
        big = client.post("/v1/files", files={"file": ("a.csv", b"x" * 300_000)}, data={"purpose": "batch"})
        close = client.post("/v1/files", files={"file": ("a.csv", b"x" * 200_001)}, data={"purpose": "batch"})
        assert (big.status_code, close.status_code) == (413, 413)
        for wrong in ("a.exe", "a.parquet.gz", "passwd"):
            reply = client.post("/v1/files", files={"file": (wrong, b"x")}, data={"purpose": "batch"})
            assert reply.status_code == 400
        sly = client.post("/v1/files", files={"file": ("../../../x.csv", b"x")}, data={"purpose": "batch"}).json()
        assert sly["filename"] == "x.csv"
        assert client.get(f"/v1/files/{sly['id']}/content").content == b"x"
    folder: Path = running.state.folder
    assert [p.name for p in folder.rglob("*") if p.is_file()] == [sly["id"]]


def test_tenants_see_nothing_of_each_other(running: Any) -> None:
    ann, bob = (running.state.keys.create(t, "u") for t in ("acme", "bolt"))
    with running.http(ann) as mine, running.http(bob) as theirs:
        file = upload(mine, parquet_bytes(ROWS))
        job = wait(mine, submit(mine, file)["id"])["id"]
        for path in (f"files/{file}", f"files/{file}/content", f"jobs/{job}", f"jobs/{job}/results"):
            assert mine.get(f"/v1/{path}").status_code == 200
            assert theirs.get(f"/v1/{path}").status_code == 404
        assert theirs.delete(f"/v1/files/{file}").status_code == 404
        assert theirs.delete(f"/v1/jobs/{job}").status_code == 404
        assert theirs.post(f"/v1/jobs/{job}/cancel").status_code == 404
        body = {"model": "echo", "prompt": "{text}", "source": {"file_id": file}}
        assert theirs.post("/v1/jobs", json=body).status_code == 404
        assert theirs.get("/v1/jobs").json()["data"] == theirs.get("/v1/files").json()["data"] == []


@pytest.mark.parametrize("place", ["/v1/jobs", "/v1/estimate"])
def test_prompts_that_are_too_large_are_refused_on_submission(running: Any, place: str) -> None:
    long = [{"text": "x" * 4_195}, {"text": "x"}]
    with running.http() as client:
        body = {"model": "echo", "source": {"file_id": upload(client, parquet_bytes(long))}}
        for prompt, told in (
            ("{text}" * 1_000, "The prompt of row 1 would have 4,195,000 bytes; at most 4,194,304 are taken. Shorten"),
            ("{text}" + "x" * 4_194_305, "The template has 4,194,305 bytes"),
            ("{text}" * 1_001, "more than 1,000 fields"),
        ):
            reply = client.post(place, json=body | {"prompt": prompt})
            assert reply.status_code in (400, 413), reply.text
            assert told in reply.json()["error"]["message"]
        assert client.get("/v1/jobs").json()["data"] == []
    stored = running.state.storage.keys()
    assert not any(key.startswith("jobs/") for key in stored)


def test_the_prompts_of_a_job_have_a_bound_together(serve: Callable[..., Any]) -> None:
    running = serve(limits=Limits(job_prompt_bytes=600))
    with running.http() as client:
        file = upload(client, parquet_bytes(ROWS))
        reply = client.post("/v1/jobs", json={"model": "echo", "prompt": "Say: {text}", "source": {"file_id": file}})
        assert (reply.status_code, reply.json()["error"]["code"]) == (413, "too_large")
        assert "at most 600 are taken. Shorten the template, or split the table" in reply.json()["error"]["message"]
        assert submit(client, file, prompt="{text}")["status"] in ("queued", "running")


def test_too_many_prompts_are_refused_before_one_is_made(
    serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    running = serve(limits=Limits(job_prompt_bytes=100_000))
    monkeypatch.setattr("complete_fn.service.submit.window_prompts", lambda *_: pytest.fail("prompts were made"))
    with running.http() as client:
        for name, content in (("t.parquet", parquet_bytes(ROWS)), ("t.jsonl", b'{"text": "one"}\n' * 100)):
            body = {
                "model": "echo",
                "prompt": "x" * 2_000 + "{text}",
                "source": {"file_id": upload(client, content, name)},
            }
            reply = client.post("/v1/jobs", json=body)
            assert (reply.status_code, reply.json()["error"]["code"]) == (413, "too_large")
