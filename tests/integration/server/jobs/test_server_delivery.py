"""Sinks that are away for a while are waited for; tables that cannot take the results are refused on submit."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest

from complete_fn.cli.main import main
from complete_fn.client import Client, DeliveryWarning
from complete_fn.errors import JobError, StorageError
from complete_fn.rows.allowed_paths import Allowed
from complete_fn.service import delivery
from complete_fn.service.delivery import deliver_next
from tests.integration.server.jobs.test_server_sources import ROWS, SAID, TEXTS, ask, put_table, wait

SINK = {"connection": "shop", "table": "answers", "key": "id"}


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A SQLite file that is a registered connection; sources and sinks may lie beside it."""
    (tmp_path / "root").mkdir()
    put_table(tmp_path / "root" / "t.parquet")
    monkeypatch.setenv("COMPLETE_FN_SOURCES", f"{tmp_path}/root")
    monkeypatch.setenv("COMPLETE_FN_SINKS", f"{tmp_path}/root")
    monkeypatch.setenv("SHOP_URL", f"sqlite:///{tmp_path}/shop.db")
    monkeypatch.setattr(delivery, "RETRY_SECONDS", 0.0)
    return tmp_path / "shop.db"


def served(serve: Callable[..., Any]) -> Any:
    running = serve()
    running.state.connections.add("local", "shop", "SHOP_URL", writable=True)
    return running


def submitted(client: httpx.Client, shop: Path, sink: dict[str, str] = SINK) -> httpx.Response:
    return ask(client, {"uri": f"{shop.parent}/root/t.parquet"}, sink=sink)


def sql(path: Path, *statements: str) -> list[Any]:
    with closing(sqlite3.connect(path)) as opened, opened:
        return [opened.execute(statement).fetchall() for statement in statements][-1]


def answers(shop: Path) -> list[Any]:
    return [row[0] for row in sql(shop, "SELECT completion FROM answers ORDER BY id")]


def test_a_sink_that_is_away_is_waited_for_by_the_hour() -> None:
    held = delivery.Delivery("job", "local", "writing", 0, None, "c", 0)
    pauses = []
    while (next_try := delivery.next_try(held, JobError("no"))) is not None:
        pauses.append(next_try)
        held = delivery.Delivery("job", "local", "writing", 0, None, "c", held.tries + 1)
    assert pauses == [10.0, 20.0]  # a sink that refuses will go on to do so
    held, pauses = delivery.Delivery("job", "local", "writing", 0, None, "c", 0), []
    while (next_try := delivery.next_try(held, StorageError("away"))) is not None:
        pauses.append(next_try)
        held = delivery.Delivery("job", "local", "writing", 0, None, "c", held.tries + 1)
    assert pauses[:3] == [10.0, 20.0, 40.0]
    assert max(pauses) == 1800.0
    assert 6 * 3600 < sum(pauses) < 12 * 3600


def test_a_file_of_duckdb_that_another_process_holds_gets_the_results_later(
    serve: Callable[..., Any], shop: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHOP_URL", f"duckdb:///{shop}")
    monkeypatch.setattr("complete_fn.service.delivery.deliver_next", lambda _: False)
    running = served(serve)
    with running.http() as client:
        job = submitted(client, shop).json()["id"]
        while client.get(f"/v1/jobs/{job}").json()["status"] != "completed":
            time.sleep(0.02)
        hold = f"import duckdb, sys; c = duckdb.connect({str(shop)!r}); print('held', flush=True); sys.stdin.read()"
        with subprocess.Popen([sys.executable, "-c", hold], stdin=-1, stdout=-1) as holder:
            assert holder.stdout is not None
            assert holder.stdout.readline() == b"held\n"
            for _ in range(8):
                assert deliver_next(running.state)
            sink = client.get(f"/v1/jobs/{job}").json()["sink"]
            assert (sink["status"], "lock on file" in sink["error"]) == ("waiting", True)
            holder.communicate()
        assert deliver_next(running.state)
        assert client.get(f"/v1/jobs/{job}").json()["sink"] == {"status": "written", "rows": ROWS, "error": None}


def test_a_disk_that_is_full_gets_the_results_later(
    serve: Callable[..., Any], shop: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed: list[str] = []
    real = Allowed.faults

    def faults(self: Allowed) -> Any:
        if self.steps[-1] == "a.jsonl" and len(failed) < 8:
            failed.append("full")
            raise StorageError("The root /operator/only cannot be used: No space left on device.")
        return real(self)

    running = served(serve)
    with running.http() as client:
        sink = {"uri": f"{shop.parent}/root/a.jsonl"}
        monkeypatch.setattr(Allowed, "refuse_unwritable", lambda _: None)
        monkeypatch.setattr(Allowed, "faults", faults)
        job = wait(client, submitted(client, shop, sink))
    assert (job["sink"]["status"], len(failed)) == ("written", 8)


def test_results_that_a_sink_refused_are_delivered_again_and_nothing_is_paid(
    serve: Callable[..., Any], shop: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = delivery.write_table

    def spoiled(*given: Any) -> None:
        sql(shop, "DROP TABLE IF EXISTS answers", "CREATE TABLE answers (id BIGINT PRIMARY KEY)")
        real(*given)

    monkeypatch.setattr(delivery, "write_table", spoiled)
    running = served(serve)
    with running.http() as client, closing(Client(running.url)) as remote:
        job = wait(client, submitted(client, shop))
        assert job["sink"]["status"] == "failed"
        assert f"POST /v1/jobs/{job['id']}/deliver" in job["sink"]["error"]
        with pytest.raises(JobError, match=f"complete-fn jobs deliver {job['id']}"):
            remote.job(job["id"]).wait()
        nothing = client.post(f"/v1/jobs/{job['id']}/rerun")
        assert (nothing.status_code, "/deliver writes" in nothing.text) == (409, True)
        monkeypatch.setattr(delivery, "write_table", real)
        sql(shop, "DROP TABLE answers")
        asked = len(running.state.engine.requests)
        again = wait(client, client.post(f"/v1/jobs/{job['id']}/deliver"))
        assert again["sink"] == {"status": "written", "rows": ROWS, "error": None}
        assert again["cost"] == job["cost"]
        for deliver in (
            lambda: remote.job(job["id"]).deliver(),
            lambda: main(["jobs", "deliver", job["id"], "--url", running.url]),
        ):
            sql(shop, "DROP TABLE answers")
            deliver()
            wait(client, client.get(f"/v1/jobs/{job['id']}"))
            assert answers(shop) == SAID
        assert len(running.state.engine.requests) == asked
    assert capsys.readouterr().err == ""


def test_only_a_finished_job_with_a_sink_is_delivered_and_only_for_its_tenant(
    serve: Callable[..., Any], shop: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = served(serve)
    with running.http() as client:
        plain = wait(client, ask(client, {"uri": f"{shop.parent}/root/t.parquet"}))
        reply = client.post(f"/v1/jobs/{plain['id']}/deliver")
        assert (reply.status_code, "has no sink" in reply.text) == (409, True)
        job = wait(client, submitted(client, shop))
    with running.http(running.state.keys.create("acme", "u")) as stranger:
        assert stranger.post(f"/v1/jobs/{job['id']}/deliver").status_code == 404


def test_a_client_that_waits_for_a_sink_says_why(
    serve: Callable[..., Any], shop: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "RETRY_SECONDS", 1.0)
    real, failed = delivery.write_table, []

    def away(*given: Any) -> None:
        if not failed:
            failed.append(True)
            raise StorageError("The sink is away.")
        real(*given)

    monkeypatch.setattr(delivery, "write_table", away)
    running = served(serve)
    with running.http() as client, closing(Client(running.url)) as remote:
        job = submitted(client, shop).json()["id"]
        with pytest.warns(DeliveryWarning, match="will be tried again: The sink is away"):
            assert remote.job(job).wait()["sink"]["status"] == "written"


UNFIT = [
    ("CREATE TABLE answers (id BIGINT PRIMARY KEY, completion TEXT)", "no column 'completion_error'"),
    ("CREATE TABLE answers (id BIGINT, completion TEXT)", "no column"),
    ("CREATE VIEW answers AS SELECT 1 AS id", "no column"),
    ("CREATE TABLE other (id BIGINT)", None),
]


@pytest.mark.parametrize(("made", "words"), UNFIT)
def test_a_table_that_cannot_take_the_results_is_refused_before_a_row_is_paid(
    serve: Callable[..., Any], shop: Path, made: str, words: str | None
) -> None:
    sql(shop, made)
    running = served(serve)
    with running.http() as client:
        reply = submitted(client, shop)
        if words is None:
            assert wait(client, reply)["sink"]["status"] == "written"
            assert answers(shop) == SAID
            return
        assert (reply.status_code, words in reply.json()["error"]["message"]) == (400, True), reply.text
        assert client.get("/v1/jobs").json()["data"] == []
    assert running.state.engine.requests == []
    assert running.state.storage.keys("jobs") == []


def test_rights_that_a_role_of_postgresql_lacks_are_found_before_a_row_is_paid(
    serve: Callable[..., Any], shop: Path, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import psycopg

    with psycopg.connect(postgres_url, autocommit=True) as owner:
        owner.execute("CREATE ROLE reader_only LOGIN PASSWORD 'hidden'")
        owner.execute("CREATE TABLE public.answers (id BIGINT PRIMARY KEY)")
        owner.execute("CREATE SCHEMA closed")
        owner.execute("REVOKE CREATE ON SCHEMA public FROM PUBLIC")
        try:
            host = postgres_url.partition("@")[2]
            monkeypatch.setenv("SHOP_URL", f"postgresql://reader_only:hidden@{host}")
            running = served(serve)
            with running.http() as client:
                for table, words in (("public.made", "permission denied"), ("closed.made", "permission denied"),
                                     ("nowhere.made", "nowhere"), ("public.answers", "no column")):  # fmt: skip
                    reply = submitted(client, shop, {**SINK, "table": table})
                    assert (reply.status_code, words in reply.text) == (400, True), reply.text
            assert running.state.engine.requests == []
        finally:
            owner.execute("DROP SCHEMA closed")
            owner.execute("DROP TABLE public.answers")
            owner.execute("DROP ROLE reader_only")


def test_a_sink_that_is_away_on_submit_is_told_without_the_operators_address(
    serve: Callable[..., Any], shop: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHOP_URL", "postgresql://operator@127.0.0.1:1/shop")
    running = serve()
    running.state.connections.add("acme", "shop", "SHOP_URL", writable=True)
    with running.http(running.state.keys.create("acme", "u")) as client:
        for body in ({"sink": SINK}, {"source": {"connection": "shop", "sql": "SELECT 1 AS text"}}):
            source = {"uri": f"{shop.parent}/root/t.parquet"}
            reply = ask(client, **{"source": source, **body})
            assert (reply.status_code, reply.json()["error"]["code"]) == (503, "database_unavailable")
            assert "operator@" not in reply.text
            assert "127.0.0.1" not in reply.text


def test_a_file_that_cannot_be_written_is_refused_before_a_row_is_paid(serve: Callable[..., Any], shop: Path) -> None:
    root = shop.parent / "root"
    (root / "folder.jsonl").mkdir()
    (root / "link").symlink_to("/tmp")
    (root / "file").write_text("")
    running = served(serve)
    with running.http() as client:
        for name in ("folder.jsonl", "link/a.jsonl", "file/a.jsonl", "x" * 300 + ".jsonl"):
            reply = submitted(client, shop, {"uri": f"{root}/{name}"})
            assert reply.status_code in (400, 404), reply.text
        assert wait(client, submitted(client, shop, {"uri": f"{root}/new/a.jsonl"}))["sink"]["status"] == "written"
    assert len(running.state.engine.requests) == len(set(TEXTS) - {None})
