"""`Client`, `complete-fn jobs` and the `engine='http://...'` of a session, against a running service."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import polars
import pyarrow as pa
import pytest
from pyarrow import parquet

from complete_fn import Client, Session
from complete_fn.cli.main import main
from complete_fn.errors import (
    EngineBusyError,
    EngineError,
    InputError,
    InvalidOptionError,
    JobError,
    KeyRefusedError,
    UnknownModelError,
)
from complete_fn.ledger.usage import usage
from complete_fn.server.fair_slots import FairSlots

TABLE = pa.table({"id": [1, 2, 3], "text": ["a", None, "c c"]})


@pytest.mark.parametrize("source", [TABLE, polars.from_arrow(TABLE)])
def test_submit_wait_results(running: Any, source: Any) -> None:
    client = Client(running.url)
    job = client.submit(source, "echo", "Say: {text}", max_cost="1", options={"max_tokens": 3})
    state = job.wait(progress=True)
    assert (state["status"], state["rows"]["done"]) == ("completed", 3)
    found = job.results()
    assert found.column("completion").to_pylist() == ["Say: a", None, "Say: c c"]
    assert polars.from_arrow(job.results(details=True)).shape == (3, 4)
    assert [j["id"] for j in client.jobs()] == [job.id]
    with pytest.raises(JobError):
        job.cancel()
    job.delete()
    assert client.jobs() == []
    assert client.ask("GET", "/files").json()["data"] == []


def test_what_the_service_refuses_is_raised_as_what_it_is(running: Any) -> None:
    client = Client(running.url + "/v1")
    with pytest.raises(UnknownModelError, match="catalogue"):
        client.submit(TABLE, "lama", "{text}")
    with pytest.raises(InvalidOptionError, match="temprature"):
        client.submit(TABLE, "echo", "{text}", options={"temprature": 1})
    with pytest.raises(InputError, match="neither a path nor"):
        client.submit(7, "echo", "{text}")
    with pytest.raises(EngineError, match="Nobody answers"):
        Client("http://127.0.0.1:9").jobs()
    assert client.ask("GET", "/files").json()["data"] == []
    running.state.keys.create("acme", "ann")
    with pytest.raises(KeyRefusedError):
        client.jobs()


def no_slot(self: FairSlots, tenant: str) -> Any:
    raise EngineBusyError(f"32 requests wait already. {self.advice}")


def test_a_busy_service_is_asked_again(running: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("complete_fn.server.error_replies.RETRY_SECONDS", 1)
    slot = FairSlots.slot
    monkeypatch.setattr(FairSlots, "slot", no_slot)
    with pytest.raises(EngineBusyError, match="read or write tables"):
        Client(running.url, timeout=0.5).submit(TABLE, "echo", "Say: {text}")
    threading.Timer(0.5, monkeypatch.setattr, (FairSlots, "slot", slot)).start()
    job = Client(running.url).submit(TABLE, "echo", "Say: {text}")
    job.wait()
    assert b"".join(job.download("jsonl")).count(b"\n") == 3


def test_jobs_from_the_shell(
    running: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COMPLETE_FN_URL", running.url)
    monkeypatch.setenv("COMPLETE_FN_KEY", running.state.keys.create("acme", "ann"))
    source, target = tmp_path / "in.parquet", tmp_path / "out.parquet"
    parquet.write_table(TABLE, source)
    submit = ["jobs", "submit", str(source), "-m", "echo", "-p", "{text}", "--option", "max_tokens=5"]
    assert main([*submit, "-o", str(target)]) == 0
    captured = capsys.readouterr()
    job = captured.out.strip()
    assert "completed: 3 of 3 rows" in captured.err
    assert parquet.read_table(target).column("completion").to_pylist() == ["a", None, "c c"]
    assert main(["jobs", "results", job, "-o", str(tmp_path / "out.csv"), "--details"]) == 0
    assert (tmp_path / "out.csv").read_text().startswith("id,text,completion,completion_details\n")
    for verb in ("list", "show", "wait", "delete"):
        assert main(["jobs", verb, *([job] if verb != "list" else [])]) == 0
    assert main(["jobs", "show", job]) == 1
    assert f"no job '{job}'" in capsys.readouterr().err
    assert main([*submit, "-o", "out.xyz"]) == 1
    assert main([*submit, "-o", "out.csv.gz"]) == 1
    assert main([*submit[:2], str(tmp_path / "none.csv"), *submit[3:]]) == 1
    assert main([*submit, "--max-cost", "0", "--wait"]) == 3  # a row that nothing may be spent on has failed


def test_results_replace_no_file_unasked(
    running: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COMPLETE_FN_URL", running.url)
    source, target = tmp_path / "in.parquet", tmp_path / "out.csv"
    parquet.write_table(TABLE, source)
    target.write_text("mine")
    submit = ["jobs", "submit", str(source), "-m", "echo", "-p", "{text}"]
    assert main([*submit, "-o", str(target)]) == 1
    assert "exists. Say --overwrite" in capsys.readouterr().err
    assert main([*submit, "-o", str(tmp_path / "none" / "out.csv")]) == 1
    assert "cannot be written" in capsys.readouterr().err
    assert main([*submit, "-o", "s3://bucket/out.csv"]) == 1
    assert "--sink-uri" in capsys.readouterr().err
    assert Client(running.url).jobs() == []  # refused before anything was paid
    assert main([*submit, "-o", str(target), "--overwrite"]) == 0
    job = capsys.readouterr().out.strip()
    assert target.read_text() == "id,text,completion\n1,a,a\n2,,\n3,c c,c c\n"
    target.write_text("mine")
    assert main(["jobs", "results", job, "-o", str(target)]) == 1
    assert target.read_text() == "mine"
    assert main(["jobs", "results", job, "-o", str(target), "--overwrite"]) == 0
    assert target.read_text().startswith("id,text,completion\n")


def test_results_that_cannot_be_written_are_still_to_be_had(
    running: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setenv("COMPLETE_FN_URL", running.url)
    monkeypatch.setattr("complete_fn.client.RemoteJob.download", full)
    parquet.write_table(TABLE, tmp_path / "in.parquet")
    target = tmp_path / "my out.csv"
    given = ["jobs", "submit", str(tmp_path / "in.parquet"), "-m", "echo", "-p", "{text}", "-o", str(target)]
    assert main([*given, "--details"]) == 1
    captured = capsys.readouterr()
    assert "No space left" in captured.err
    assert f"`complete-fn jobs results {captured.out.strip()} -o '{target}' --details`" in captured.err
    assert list(tmp_path.glob("*.part")) == []


def replying(monkeypatch: pytest.MonkeyPatch, answer: Callable[[httpx.Request], httpx.Response]) -> Client:
    """A client of a server that is none of ours."""
    client = Client("http://elsewhere")
    monkeypatch.setattr(client, "http", httpx.Client(base_url=client.url, transport=httpx.MockTransport(answer)))
    return client


class Broken(httpx.SyncByteStream):
    def __iter__(self) -> Iterator[bytes]:
        yield b"id,"
        raise httpx.ReadError("peer closed")


@pytest.mark.parametrize(
    ("reply", "told"),
    [
        (httpx.Response(200, html="<p>Welcome"), "is a complete-fn service there"),
        (httpx.Response(200, text="OK"), "is a complete-fn service there"),
        (httpx.Response(302, headers={"location": "/login"}), "302 with a redirect to /login; is a complete-fn"),
    ],
)
def test_another_server_than_ours_is_told(monkeypatch: pytest.MonkeyPatch, reply: httpx.Response, told: str) -> None:
    client = replying(monkeypatch, lambda _: reply)
    with pytest.raises(EngineError, match=told):
        client.jobs()
    if "html" in reply.headers.get("content-type", "") or reply.is_redirect:
        with pytest.raises(EngineError, match=told):
            list(client.job("j").download("csv"))
        with pytest.raises(EngineError, match=told):
            client.job("j").results()


def test_results_that_break_off_say_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    client = replying(monkeypatch, lambda _: httpx.Response(200, stream=Broken()))
    with pytest.raises(EngineError, match=r"peer closed.*complete-fn jobs results j7 -o"):
        list(client.job("j7").download("csv"))


@pytest.mark.parametrize("url", ["http://[::1", "http://host:port"])
def test_an_address_that_is_no_url_is_named(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["jobs", "list", "--url", url]) == 1
    assert f"{url!r} is no URL" in capsys.readouterr().err


def test_a_job_that_has_begun_is_given_though_its_upload_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        if request.method == "DELETE":
            raise httpx.ConnectError("gone")
        return httpx.Response(200, json={"id": request.url.path.rpartition("/")[2]})

    assert replying(monkeypatch, answer).submit(TABLE, "echo", "{text}").id == "jobs"


def test_a_session_asks_the_service_as_its_engine(running: Any, tmp_path: Path) -> None:
    session = Session(engine=f"{running.url}/v1", home=tmp_path / "client")
    assert session.complete("echo", ["one two", None, "one two"]).text.to_pylist() == ["one two", None, "one two"]
    session.close()
    assert sum(line.cost for line in usage(running.state.store)) > 0


def test_an_upload_without_a_key_is_refused_before_it_is_read(serve: Callable[..., Any]) -> None:
    running = serve(loopback=False)
    host, port = running.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as link:
        link.sendall(b"POST /v1/files HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n")
        assert link.recv(100).startswith(b"HTTP/1.1 401")
