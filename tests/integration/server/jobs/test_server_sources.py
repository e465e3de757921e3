"""Jobs that read and write by themselves: allowed roots, registered connections, and what is refused of them."""

from __future__ import annotations

import gzip
import io
import json
import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import duckdb
import httpx
import pyarrow as pa
import pytest
from pyarrow import parquet

from complete_fn import EchoEngine
from complete_fn.rows.object_storage import Storage
from complete_fn.service.delivery import deliver_next
from complete_fn.service.retention import expire
from complete_fn.service.state import Limits
from complete_fn.types import Completion, CompletionRequest
from tests.clocks import pass_time
from tests.objects import object_server

ROWS = 120
TEXTS = [None if n % 10 == 0 else f"row {n}" for n in range(ROWS)]
SAID = [t and f"Say: {t}" for t in TEXTS]


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("complete_fn.rows.readers.WINDOW_ROWS", 50)


@pytest.fixture
def roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with in/ and out/local/ allowed, and what is around it not."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "local").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "local").mkdir()
    (tmp_path / "secret.csv").write_text("text\nsecret\n")
    monkeypatch.setenv("COMPLETE_FN_SOURCES", f"{tmp_path}/in/{{tenant}}/ s3://nowhere/in")
    monkeypatch.setenv("COMPLETE_FN_SINKS", f"{tmp_path}/out/{{tenant}}")
    return tmp_path


def put_table(path: Path) -> Path:
    parquet.write_table(pa.table({"id": range(ROWS), "text": TEXTS}), path)
    return path


def ask(client: httpx.Client, source: dict[str, Any], **more: Any) -> httpx.Response:
    return client.post("/v1/jobs", json={"model": "echo", "prompt": "Say: {text}", "source": source, **more})


def wait(client: httpx.Client, reply: httpx.Response) -> dict[str, Any]:
    """The job once it is over and its results are delivered."""
    assert reply.status_code in (200, 201), reply.text
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        found: dict[str, Any] = client.get(f"/v1/jobs/{reply.json()['id']}").json()
        sink = (found["sink"] or {}).get("status")
        if found["status"] in ("completed", "failed", "cancelled") and sink not in ("waiting", "writing"):
            return found
        time.sleep(0.05)
    raise AssertionError(found)


def results(client: httpx.Client, job: str, **query: Any) -> list[dict[str, Any]]:
    reply = client.get(f"/v1/jobs/{job}/results", params=query)
    assert reply.status_code == 200, reply.text
    return list(parquet.read_table(io.BytesIO(reply.content)).to_pylist())


# -- roots -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_a_file_under_a_root_into_one_under_another(roots: Path, serve: Callable[..., Any], kind: str) -> None:
    put_table(roots / "in" / "local" / "t.parquet")
    with serve().http() as client:
        uri = f"file://{roots}/in/local/t.parquet"
        job = wait(client, ask(client, {"uri": uri}, sink={"uri": f"{roots}/out/local/new/a.{kind}"}))
        again = results(client, job["id"])
    target = roots / "out" / "local" / "new" / f"a.{kind}"
    lines = target.read_text().splitlines() if kind == "jsonl" else []
    found = [json.loads(line) for line in lines] if lines else parquet.read_table(target).to_pylist()
    assert [r["completion"] for r in found] == [r["completion"] for r in again] == SAID
    assert found[1]["completion_details"]["source"] == "computed"
    assert (job["sink"], job["rows"]["done"]) == ({"status": "written", "rows": ROWS, "error": None}, ROWS)
    assert os.listdir(target.parent) == [target.name]


OUTSIDE = [
    "/etc/passwd.csv", "{roots}/secret.csv", "{roots}/in/local/../../secret.csv", "{roots}/in/local/%2e%2e/x.csv",
    "file:///etc/passwd", "{roots}/in/local/link.csv", "{roots}/in/local/folder/secret.csv",
    "{roots}/in/local/pipe.csv",
    "{roots}/in/local", "{roots}/in/other/x.csv", "{roots}/in/locale.csv", "{roots}/in/local/\u0000.csv",
    "http://169.254.169.254/latest/meta-data/x.csv", "http://127.0.0.1/x.csv", "https://example.com/x.csv",
    "ftp://127.0.0.1/x.csv", "s3://elsewhere/in/x.csv", "s3://nowhere/inside/x.csv", "s3://key:secret@nowhere/in/x.csv",
    "s3://nowhere:80@evil/in/x.csv", "s3://nowhere/in/../x.csv", "simplecache::file:///etc/passwd.csv",
    "file::s3://nowhere/in/x.csv", "zip://x.csv::file:///etc/x.zip", "memory://in/x.csv", "sqlite:////etc/x.csv",
    "{roots}/in/local/*.csv", "{roots}/in/{{tenant}}/x.csv", "//etc/passwd.csv", "in/local/t.csv", "", "a" * 1025,
    "postgresql://127.0.0.1/x.csv", "duckdb:///x.csv", "\\\\host\\share\\x.csv",
]  # fmt: skip


def test_nothing_outside_the_roots_can_be_named(roots: Path, serve: Callable[..., Any]) -> None:
    inside = roots / "in" / "local"
    (inside / "link.csv").symlink_to(roots / "secret.csv")
    (inside / "folder").symlink_to(roots)
    os.mkfifo(inside / "pipe.csv")
    (roots / "in" / "other").mkdir()
    (roots / "in" / "other" / "x.csv").write_text("text\nanother tenant's\n")
    (roots / "in" / "locale.csv").write_text("text\nbeside\n")
    put_table(inside / "t.parquet")
    running = serve()
    with running.http() as client:
        for name in [uri.format(roots=roots) for uri in OUTSIDE]:
            for reply in (
                ask(client, {"uri": name}),
                ask(client, {"uri": f"{inside}/t.parquet"}, sink={"uri": name.replace("/in/local/", "/out/else/")}),
            ):
                assert reply.status_code in (400, 404), (name, reply.text)
                assert "secret\n" not in reply.text
                assert "No such" not in reply.text
        assert client.get("/v1/jobs").json()["data"] == []
    assert running.state.storage.keys() == []
    assert (roots / "secret.csv").read_text() == "text\nsecret\n"


def test_a_link_in_a_sink_is_not_followed(roots: Path, serve: Callable[..., Any]) -> None:
    put_table(roots / "in" / "local" / "t.parquet")
    (roots / "out" / "local" / "x.jsonl").symlink_to(roots / "secret.csv")
    (roots / "out" / "local" / "away").symlink_to(roots)
    with serve().http() as client:
        source = {"uri": f"{roots}/in/local/t.parquet"}
        first = wait(client, ask(client, source, sink={"uri": f"{roots}/out/local/x.jsonl"}))
        second = ask(client, source, sink={"uri": f"{roots}/out/local/away/y.jsonl"})
    assert (first["sink"]["status"], second.status_code) == ("written", 404)
    assert (roots / "secret.csv").read_text() == "text\nsecret\n"  # the link itself was replaced
    assert not (roots / "y.jsonl").exists()


def test_bombs_are_refused(roots: Path, serve: Callable[..., Any]) -> None:
    inside = roots / "in" / "local"
    (inside / "b.csv.gz").write_bytes(gzip.compress(b"text\n" + b"a" * 20_000_000))
    (inside / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "' + b"a" * 20_000_000))
    parquet.write_table(pa.table({"text": ["x" * 100_000] * 500}), inside / "b.parquet")  # one page, 50 MB in 20 kB
    nested = pa.table({"text": ["x"] * 500, "deep": [[{"a": "y" * 100_000}]] * 500})
    parquet.write_table(nested, inside / "n.parquet")
    (inside / "p.parquet.gz").write_bytes(gzip.compress((inside / "b.parquet").read_bytes()))
    with serve(limits=Limits(table_bytes=2_000_000)).http() as client:
        for name in ("b.csv.gz", "b.jsonl.gz", "b.parquet", "n.parquet", "p.parquet.gz"):
            reply = ask(client, {"uri": f"{inside}/{name}"})
            assert reply.status_code == 413, (name, reply.text)
            assert reply.json()["error"]["code"] == "too_large"


# -- connections -----------------------------------------------------------------------------------------------------


@pytest.fixture(params=["sqlite", "duckdb", "postgresql"])
def connection(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The kind of a database with a table `docs`, its URL in DOCS_URL."""
    url = f"{request.param}:///{tmp_path / 'docs.db'}"
    if request.param == "postgresql":
        url = request.getfixturevalue("postgres_url")
    monkeypatch.setenv("DOCS_URL", url)
    values = ", ".join(f"({n}, {'NULL' if t is None else repr(t)})" for n, t in enumerate(TEXTS))
    execute(url, "CREATE TABLE docs (id BIGINT PRIMARY KEY, text VARCHAR(99))", f"INSERT INTO docs VALUES {values}")
    return url


def execute(url: str, *statements: str) -> list[Any]:
    if url.startswith("postgresql"):
        import psycopg

        with psycopg.connect(url) as server:
            for statement in statements:
                cursor = server.execute(statement.encode())
            return cursor.fetchall() if cursor.description else []
    path = url.partition(":///")[2]
    opened: Any = duckdb.connect(path) if url.startswith("duckdb") else sqlite3.connect(path)
    for statement in statements:
        found = opened.execute(statement).fetchall()
    if isinstance(opened, sqlite3.Connection):
        opened.commit()
    opened.close()
    return list(found)


@pytest.mark.usefixtures("small_windows")
def test_a_query_into_a_table_once_and_again(connection: str, serve: Callable[..., Any]) -> None:
    running = serve()
    running.state.connections.add("local", "docs", "DOCS_URL", writable=True)
    source = {"connection": "docs", "sql": "SELECT id, text FROM docs ORDER BY id;"}
    sink = {"connection": "docs", "table": "answers", "key": "id"}
    with running.http() as client:
        job = wait(client, ask(client, source, sink=sink))
        assert job["sink"] == {"status": "written", "rows": ROWS, "error": None}
        wait(client, ask(client, source, sink=sink, options={"max_tokens": 2}))
        unnamed = wait(client, ask(client, source, sink={"connection": "docs", "table": "numbered"}))
    assert unnamed["sink"]["status"] == "written"
    found = execute(connection, "SELECT id, completion, completion_error FROM answers ORDER BY id")
    assert [r[1] for r in found] == [t and " ".join(t.split()[:2]) for t in SAID]
    assert [r[0] for r in execute(connection, "SELECT row FROM numbered ORDER BY 1")] == list(range(ROWS))
    with running.state.store.read() as stored:
        dump = str(stored.exec_driver_sql("SELECT * FROM connections").all())
        assert connection not in dump
        assert connection not in str(stored.exec_driver_sql("SELECT request, error FROM jobs").all())


MORE_THAN_A_SELECT = [
    "DELETE FROM docs", "DROP TABLE docs", "SELECT 1; DROP TABLE docs", "SELECT 1) AS q; DROP TABLE docs; --",
    "SELECT 1) AS q; DROP TABLE docs; SELECT (1", "WITH x AS (DELETE FROM docs RETURNING *) SELECT * FROM x",
    "SELECT * FROM docs INTO OUTFILE '/tmp/x'", "SELECT 1 /* ) */", "SELECT 1 -- x", "SELECT 'a\\' ) --'", "", ";",
    "ATTACH '/tmp/x.db' AS y", "PRAGMA query_only = OFF", "COPY docs TO '/tmp/x.csv'", "INSTALL httpfs",
    "SELECT * FROM read_csv('/etc/passwd')", "SELECT * FROM '/etc/passwd'", "SET lock_configuration = false",
    "SELECT pg_read_file('/etc/passwd') AS no_such_right FROM nothing", "SELECT missing FROM docs", "VALUES (1",
    "SELECT id FROM docs", "CALL x()", "EXPLAIN ANALYZE DELETE FROM docs", "SELECT $$ ) $$ FROM docs",
]  # fmt: skip


def test_sql_that_is_more_than_a_select(connection: str, serve: Callable[..., Any]) -> None:
    running = serve()
    running.state.connections.add("local", "docs", "DOCS_URL", writable=True)
    with running.http() as client:
        for sql in MORE_THAN_A_SELECT:
            reply = ask(client, {"connection": "docs", "sql": sql})
            assert reply.status_code in (400, 404), (sql, reply.text)
            assert "root:" not in reply.text
            assert connection not in reply.text
        assert client.get("/v1/jobs").json()["data"] == []
    assert execute(connection, "SELECT count(*) FROM docs") == [(ROWS,)]


def test_connections_belong_to_a_tenant(connection: str, serve: Callable[..., Any]) -> None:
    running = serve()
    running.state.connections.add("acme", "docs", "DOCS_URL", writable=False)
    ann, bob = (running.state.keys.create(t, "u") for t in ("acme", "bolt"))
    source = {"connection": "docs", "sql": "SELECT id, text FROM docs"}
    with running.http(ann) as mine, running.http(bob) as theirs:
        job = wait(mine, ask(mine, source))
        stranger, nobody = ask(theirs, source), ask(theirs, {**source, "connection": "nothing"})
        assert (stranger.status_code, nobody.status_code) == (404, 404)
        assert stranger.text.replace("docs", "X") == nobody.text.replace("nothing", "X")
        assert theirs.post(f"/v1/jobs/{job['id']}/rerun").status_code == 404
        sink = ask(mine, source, sink={"connection": "docs", "table": "answers"})
        assert (sink.status_code, "for reading" in sink.text) == (400, True)
    running.state.connections.remove("acme", "docs")
    running.state.connections.add("acme", "docs", "NO_SUCH_VARIABLE", writable=False)
    with running.http(ann) as mine:
        gone = ask(mine, source)
        assert (gone.status_code, "NO_SUCH_VARIABLE" in gone.text) == (400, False)


BAD_SINKS = [
    ({"connection": "docs", "table": "a; DROP TABLE docs"}, "no name of a table"),
    ({"connection": "docs", "table": "answers", "key": "nothing"}, "no column"),
    ({"connection": "docs", "table": "answers", "key": "same"}, "more than once"),
    ({"connection": "docs", "table": "answers", "key": "text"}, "NULL in"),
    ({"connection": "docs", "table": "docs"}, "no column"),
    ({"connection": "docs"}, "takes uri"),
    ({"uri": "/x.csv", "key": "id"}, "takes uri"),
    ({}, "takes uri"),
]


def test_sinks_that_cannot_be_written(connection: str, serve: Callable[..., Any]) -> None:
    running = serve()
    running.state.connections.add("local", "docs", "DOCS_URL", writable=True)
    source = {"connection": "docs", "sql": "SELECT id, text, 1 AS same FROM docs"}
    with running.http() as client:
        for sink, words in BAD_SINKS:
            reply = ask(client, source, sink=sink)
            assert (reply.status_code, words in reply.json()["error"]["message"]) == (400, True), reply.text
    assert running.state.engine.requests == []
    assert execute(connection, "SELECT count(*) FROM docs") == [(ROWS,)]


def test_a_writer_that_died_half_way_is_followed_by_another(
    connection: str, serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, small_windows: None
) -> None:
    monkeypatch.setattr("complete_fn.service.delivery.deliver_next", lambda _: False)
    running = serve()
    running.state.connections.add("local", "docs", "DOCS_URL", writable=True)
    source = {"connection": "docs", "sql": "SELECT id, text FROM docs"}
    with running.http() as client:
        reply = ask(client, source, sink={"connection": "docs", "table": "answers", "key": "id"})
        while client.get(f"/v1/jobs/{reply.json()['id']}").json()["status"] != "completed":
            time.sleep(0.05)
        with pytest.MonkeyPatch.context() as patch:
            dying(patch)
            with pytest.raises(SystemExit):
                deliver_next(running.state)
        half = client.get(f"/v1/jobs/{reply.json()['id']}").json()["sink"]
        assert half["status"] == "writing"
        assert not deliver_next(running.state)  # leased
        pass_time(running.state.store, 120)
        assert deliver_next(running.state)
        assert client.get(f"/v1/jobs/{reply.json()['id']}").json()["sink"]["status"] == "written"
    assert len(execute(connection, "SELECT id FROM answers")) == ROWS


def dying(patch: pytest.MonkeyPatch) -> None:
    from complete_fn.service import delivery as deliveries

    move, moves = deliveries.move, []

    def once(state: Any, held: Any, **values: Any) -> None:
        moves.append(values)
        if len(moves) == 2:
            raise SystemExit
        move(state, held, **values)

    patch.setattr(deliveries, "move", once)


# -- rerun, expiry, other storages -------------------------------------------------------------------------------------


class Moody(EchoEngine):
    """Some rows fail for as long as it is in a mood."""

    mood = True

    def stream(self, requests: Iterable[CompletionRequest], tenant: str) -> Iterator[tuple[int, Completion]]:
        for place, found in super().stream(requests, tenant):
            bad = self.mood and str(found.text).endswith("3")
            yield place, Completion.failed("timeout", "Too late.") if bad else found


@pytest.mark.usefixtures("small_windows")
def test_only_failed_rows_are_run_again(serve: Callable[..., Any], roots: Path) -> None:
    put_table(roots / "in" / "local" / "t.parquet")
    engine = Moody(64)
    with serve(engine).http() as client:
        sink = {"uri": f"{roots}/out/local/a.parquet"}
        job = wait(client, ask(client, {"uri": f"{roots}/in/local/t.parquet"}, sink=sink))
        assert job["rows"] == {"total": ROWS, "done": ROWS, "failed": 12, "null": 12}
        engine.mood, asked, paid = False, len(engine.requests), job["cost"]["amount"]
        again = wait(client, client.post(f"/v1/jobs/{job['id']}/rerun"))
        assert again["rows"] == {"total": ROWS, "done": ROWS, "failed": 0, "null": 12}
        assert len(engine.requests) - asked == 12
        assert again["cost"]["amount"] > paid
        assert [r["completion"] for r in results(client, job["id"])] == SAID
        nothing = client.post(f"/v1/jobs/{job['id']}/rerun", json={})
        assert (nothing.status_code, "nothing to run again" in nothing.text) == (409, True)
    assert [r["completion"] for r in parquet.read_table(roots / "out" / "local" / "a.parquet").to_pylist()] == SAID


def test_rows_beyond_the_cap_are_run_again_with_a_higher_one(running: Any) -> None:
    content = io.BytesIO()
    parquet.write_table(pa.table({"text": [f"row {n}" for n in range(50)]}), content)
    with running.http() as client:
        sent = client.post(
            "/v1/files", files={"file": ("t.parquet", content.getvalue())}, data={"purpose": "user_data"}
        )
        job = wait(client, ask(client, {"file_id": sent.json()["id"]}, options={"max_tokens": 2}, max_cost="0.000200"))
        assert job["rows"]["failed"] > 0
        assert client.post(f"/v1/jobs/{job['id']}/rerun", json={"max_cost": "0.0001"}).status_code == 400
        again = wait(client, client.post(f"/v1/jobs/{job['id']}/rerun", json={"max_cost": "1"}))
        assert again["rows"] == {"total": 50, "done": 50, "failed": 0, "null": 0}


def test_files_and_jobs_expire(running: Any) -> None:
    now = time.time()
    with running.http() as client:
        sent = running.openai().files.create(
            file=("t.csv", b"text\na\n"), purpose="user_data", expires_after={"anchor": "created_at", "seconds": 3600}
        )
        kept = running.openai().files.create(file=("t.csv", b"text\na\n"), purpose="user_data")
        assert abs(sent.expires_at - now - 3600) < 60
        assert abs(kept.expires_at - now - 30 * 86_400) < 60
        job = wait(client, ask(client, {"file_id": sent.id}))
        pass_time(running.state.store, 4000)
        expire(running.state)
        assert client.get(f"/v1/files/{sent.id}").status_code == 404
        assert client.get(f"/v1/files/{kept.id}").status_code == 200
        assert client.get(f"/v1/jobs/{job['id']}/results").status_code == 200
        pass_time(running.state.store, 31 * 86_400)
        expire(running.state)
        assert client.get(f"/v1/jobs/{job['id']}").status_code == 404
        short = client.post(
            "/v1/files",
            files={"file": ("t.csv", b"x")},
            data={"purpose": "user_data", "expires_after[anchor]": "created_at", "expires_after[seconds]": "60"},
        )
        assert short.status_code == 400
    assert running.state.storage.keys() == []


@pytest.mark.usefixtures("small_windows")
def test_a_service_that_keeps_everything_in_object_storage(
    serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with object_server("service-test") as bucket:
        monkeypatch.setenv("COMPLETE_FN_STORAGE", f"{bucket}/home")
        monkeypatch.setenv("COMPLETE_FN_SOURCES", f"{bucket}/in")
        monkeypatch.setenv("COMPLETE_FN_SINKS", f"{bucket}/out")
        with Storage(f"{bucket}/in").writing("docs.parquet") as sink:
            parquet.write_table(pa.table({"id": range(ROWS), "text": TEXTS}), sink)
        running = serve()
        with running.http() as client:
            job = wait(client, ask(client, {"uri": f"{bucket}/in/docs.parquet"}, sink={"uri": f"{bucket}/out/a.jsonl"}))
            assert [r["completion"] for r in results(client, job["id"])] == SAID
            assert running.state.storage.keys("jobs")
            assert client.delete(f"/v1/jobs/{job['id']}").status_code == 200
        assert running.state.storage.keys() == []
        assert not [p for p in running.state.folder.rglob("*") if p.is_file()]
        with Storage(f"{bucket}/out").reading("a.jsonl") as source:
            assert [json.loads(line)["completion"] for line in source] == SAID
        running.end()
