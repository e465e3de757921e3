"""complete_submit() inside a real PostgreSQL, where answers of the service are lost or late."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import psycopg
import pytest

from tests.integration.server.call_outs.test_postgres_functions import finished, one
from tests.integration.server.conftest import Install, Running


class Between(ThreadingHTTPServer):
    """Passes everything on to a service, but loses the answers to the requests in `lost`, each once.

    With a gate, submissions of jobs wait for it before they are passed on.
    """

    def __init__(self, running: Running, lost: list[str], gate: threading.Event | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Passing)
        self.running, self.lost, self.gate = running, lost, gate
        self.seen: list[str] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def __exit__(self, *raised: object) -> None:
        self.shutdown()
        super().__exit__(*raised)

    def in_place_of_the_service(self, con: psycopg.Connection[Any]) -> None:
        con.execute("UPDATE complete_fn.service SET url = %s", [f"http://127.0.0.1:{self.server_port}"])


class Passing(BaseHTTPRequestHandler):
    server: Between

    def do_POST(self) -> None:
        between = self.server
        what = " ".join([self.command, *self.path.split("/")[2:3]])
        between.seen.append(what)
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if between.gate is not None and what == "POST jobs":
            between.gate.wait(60)
        with between.running.http() as client:
            headers = {"Content-Type": self.headers["Content-Type"]}
            reply = client.request(self.command, self.path, content=content, headers=headers)
        if what in between.lost:
            between.lost.remove(what)
            return
        self.send_response(reply.status_code)
        self.send_header("Content-Length", str(len(reply.content)))
        self.end_headers()
        self.wfile.write(reply.content)

    do_GET = do_DELETE = do_POST

    def log_message(self, format: str, *args: Any) -> None:
        pass


def kept(running: Running, what: str) -> list[Any]:
    with running.http() as client:
        return list(client.get(f"/v1/{what}").raise_for_status().json()["data"])


ONE_ROW = "SELECT complete_submit('SELECT 1 AS id', 'echo', 'row {id}')"


@pytest.mark.parametrize("lost", ["POST jobs", "DELETE files"])
def test_a_job_whose_answer_is_lost_is_submitted_once(
    serve: Callable[..., Running], installed: Install, lost: str
) -> None:
    running = serve()
    con = installed(running)
    with Between(running, [lost]) as between:
        between.in_place_of_the_service(con)
        job = one(con, ONE_ROW)
        assert between.lost == []
        assert [j["id"] for j in kept(running, "jobs")] == [job]
        assert finished(con, job)[0] == "completed"
        assert kept(running, "files") == []
        assert one(con, ONE_ROW) != job  # submitted again, it is another job


def test_a_submission_that_fails_leaves_no_file(serve: Callable[..., Running], installed: Install) -> None:
    running = serve()
    con = installed(running)
    with pytest.raises(psycopg.Error, match="'nope'"):
        con.execute("SELECT complete_submit('SELECT 1 AS id', 'nope', 'row {id}')")
    assert kept(running, "files") == []
    with Between(running, ["POST jobs", "POST jobs"]) as between:
        between.in_place_of_the_service(con)
        with pytest.raises(psycopg.Error) as caught:
            con.execute(ONE_ROW.encode())
    assert caught.value.sqlstate == "08001"
    assert "`complete-fn jobs list`" in str(caught.value.diag.message_hint)
    assert between.seen == ["POST files", "POST jobs", "POST jobs", "DELETE files"]
    assert kept(running, "files") == []


def test_a_submission_can_be_cancelled_while_the_service_works_on_it(
    serve: Callable[..., Running], installed: Install
) -> None:
    running = serve()
    con = installed(running)
    gate = threading.Event()
    with Between(running, [], gate) as between:
        between.in_place_of_the_service(con)
        threading.Timer(1.0, con.cancel).start()
        began = time.monotonic()
        with pytest.raises(psycopg.errors.QueryCanceled):
            con.execute(ONE_ROW.encode())
        assert time.monotonic() - began < 10
        assert kept(running, "files") == []
        gate.set()
