"""A service whose workers are processes of their own: they come, share the work, are killed, and nothing is lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis

from complete_fn.cli.main import main
from complete_fn.jobs.queue import CeleryQueue, queue_name, without_password
from complete_fn.jobs.worker_store import Beat
from complete_fn.service.engine_host import EngineHost
from complete_fn.service.state import ServiceState
from complete_fn.worker.fleet import Fleet, worker_starter
from complete_fn.worker.maintenance import Maintenance
from deploy.servers import Redis, running
from tests.integration.server.conftest import at_service

HANG = 120.0
MODELS = """
[models.slow]
engine = 'echo'
checkpoint = 'slow'
engine_args = { row_seconds = 0.02 }
prices = { input = 1, output = 2 }
"""


@dataclass
class Site:
    """An API in this process, and worker processes, on one state and one broker."""

    home: Path
    broker: str
    state: ServiceState
    http: httpx.Client
    workers: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def work(self, *options: str, own: Mapping[str, str] | None = None, **more: Any) -> subprocess.Popen[bytes]:
        """Another worker process, once it is at work; `own` is its own environment."""
        command = [sys.executable, "-m", "complete_fn", "worker", "--home", str(self.home), *options]
        known = {"COMPLETE_FN_BROKER": self.broker, "COMPLETE_FN_MODELS": str(self.home / "models.toml")}
        worker = subprocess.Popen(command, env={**os.environ, **known, **(own or {})}, **more)
        self.workers.append(worker)
        until(lambda: any(beat.pid == worker.pid for beat in self.state.workers.alive()))
        return worker

    def submit(self, rows: int, name: str = "row", model: str = "slow", tokens: int = 8, **more: Any) -> str:
        lines = "\n".join(json.dumps({"id": n, "text": f"{name} number {n}"}) for n in range(rows))
        files = {"file": ("rows.jsonl", lines)}
        file = self.http.post("/v1/files", files=files, data={"purpose": "user_data"}).json()["id"]
        body = {"model": model, "prompt": "{text}", "source": {"file_id": file}, "options": {"max_tokens": tokens}}
        return str(self.http.post("/v1/jobs", json=body | more).json()["id"])

    def job_state(self, job: str) -> dict[str, Any]:
        found: dict[str, Any] = self.http.get(f"/v1/jobs/{job}").json()
        return found

    def done(self, job: str) -> int:
        return int(self.job_state(job)["rows"]["done"])

    def finish(self, job: str, seconds: float = HANG) -> dict[str, Any]:
        until(lambda: self.job_state(job)["status"] not in ("queued", "running", "stopping"), seconds)
        return self.job_state(job)

    def results(self, job: str) -> list[dict[str, Any]]:
        text = self.http.get(f"/v1/jobs/{job}/results", params={"format": "jsonl", "details": True}).text
        return [json.loads(line) for line in text.splitlines()]

    def beats(self) -> list[Beat]:
        return self.state.workers.alive()


def until(true: Callable[[], object], seconds: float = HANG) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.05)


@contextmanager
def site(home: Path, broker: str, models: str = MODELS, workers: tuple[int, int] | None = None) -> Iterator[Site]:
    home.mkdir(parents=True)
    (home / "models.toml").write_text(models)
    state = ServiceState(home, home / "models.toml", queue=CeleryQueue(broker))
    engines = EngineHost(state, idle_seconds=3.0)
    fleet = None
    if workers is not None:
        fleet = Fleet(state.workers, worker_starter(state.settings, broker, 3.0), *workers, idle_seconds=3.0)
    with ExitStack() as stack:
        server = stack.enter_context(at_service(engines, maintenance=Maintenance(engines, fleet)))
        found = Site(home, broker, state, server.http())
        try:
            yield found
        finally:
            for worker in found.workers:
                worker.kill()
                worker.wait()


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("complete_fn.service.job_files.PART_ROWS", 40)


def whole(found: Site, job: str, rows: int, name: str = "row") -> None:
    """Every row once and in order; what is billed are the tokens of the rows."""
    now = found.job_state(job)
    assert now["status"] == "completed"
    results = found.results(job)
    assert [(r["id"], r["completion"]) for r in results] == [(n, f"{name} number {n}") for n in range(rows)]
    assert now["rows"] == {"total": rows, "done": rows, "failed": 0, "null": 0}
    assert now["usage"] == {"prompt_tokens": 3 * rows, "cached_tokens": 0, "completion_tokens": 3 * rows}
    assert Decimal(now["cost"]["amount"]) == Decimal(rows * (3 + 6)) / 1_000_000


def test_workers_and_the_broker_are_killed_in_the_middle_of_a_job(tmp_path: Path) -> None:
    with running(Redis) as broker, site(tmp_path / "home", broker.url) as found:
        first, _ = found.work(), found.work()
        job = found.submit(600)
        until(lambda: len([b for b in found.beats() if b.in_flight]) == 2)
        first.kill()
        broker.restart(signal.SIGKILL)
        found.work("--poll-seconds", "1000")
        until(lambda: found.done(job) > 300)
        found.workers[1].kill()
        assert found.finish(job)["eta_seconds"] is None
        whole(found, job, 600)
        assert [b.pid for b in found.beats()] == [found.workers[2].pid]
        broker.restart(signal.SIGKILL)
        found.finish(found.submit(10, "again"))  # its message came: the worker would not look by itself


def test_a_worker_drains_and_a_job_is_cancelled_in_another_process(tmp_path: Path, redis_server: Redis) -> None:
    with site(tmp_path / "home", redis_server.url) as found:
        worker = found.work("--drain-seconds", "0")
        job = found.submit(2_000)
        until(lambda: found.done(job) > 20)
        worker.terminate()
        assert worker.wait(30) == 0
        assert found.beats() == []
        assert {part.status for part in found.state.jobs.parts(job)} <= {"queued", "done"}
        worker = found.work()
        until(lambda: found.job_state(job)["status"] == "running" and found.beats()[0].in_flight)
        began = time.monotonic()
        found.http.post(f"/v1/jobs/{job}/cancel")
        now = found.finish(job)
        assert time.monotonic() - began < 5
        assert now["status"] == "cancelled"
        answered = [r for r in found.results(job) if r["completion"] is not None]
        assert now["usage"]["completion_tokens"] == 3 * len(answered)
        small = found.submit(20, "small")
        until(lambda: found.done(small) > 0)
        worker.terminate()  # finishes what it has in hand
        assert worker.wait(30) == 0
        whole(found, small, 20, "small")


def test_workers_come_when_there_is_work_and_go_when_there_is_none(tmp_path: Path, redis_server: Redis) -> None:
    with site(tmp_path / "home", redis_server.url, workers=(0, 1)) as found:
        time.sleep(2)
        assert found.beats() == []
        job = found.submit(200)
        until(found.beats)
        crashed = found.beats()[0].pid
        until(lambda: found.done(job))
        os.kill(crashed, signal.SIGKILL)
        found.finish(job)
        whole(found, job, 200)
        assert crashed not in [b.pid for b in found.beats()]
        for number in range(5):  # how fast it is is told with a heartbeat; what was left of the job may be too little
            if any(pace.tokens_per_second for pace in found.state.workers.paces().values()):
                break
            found.finish(found.submit(300, f"again {number}"))
        measured = found.state.workers.paces()["slow"]
        assert measured.cold_seconds is not None
        shown = found.http.get("/metrics").text
        assert 'complete_fn_workers{draining="false"} 1.0' in shown
        assert 'complete_fn_cold_start_seconds{model="slow"}' in shown
        until(lambda: not found.beats())  # idle for three seconds
        waiting = found.submit(400, "more")
        assert found.job_state(waiting)["eta_seconds"] > measured.cold_seconds
        found.http.post(f"/v1/jobs/{waiting}/cancel")


def test_a_chat_wakes_a_worker_process_and_is_answered_there(tmp_path: Path, redis_server: Redis) -> None:
    body = {"model": "slow", "messages": [{"role": "user", "content": "one two"}], "stream": True}
    with site(tmp_path / "home", redis_server.url, workers=(0, 1)) as found:
        first = found.http.post("/v1/chat/completions", json=body)
        assert (first.status_code, first.headers["retry-after"]) == (503, "5")
        until(lambda: any(beat.address for beat in found.beats()))
        until(lambda: found.http.post("/v1/chat/completions", json=body).status_code == 200)
        reply = found.http.post("/v1/chat/completions", json=body)
        assert '"content": "two"' in reply.text
        assert found.http.get("/metrics").text.count('complete_fn_workers{draining="false"} 1.0') == 1


def test_a_message_says_only_that_there_is_work_for_a_model(tmp_path: Path, redis_server: Redis) -> None:
    with site(tmp_path / "home", redis_server.url) as found, redis.Redis(port=redis_server.port) as client:
        client.flushall()
        job = found.submit(400)
        name = queue_name("slow")
        time.sleep(4)  # announced again meanwhile: topped up, not piled up
        messages = client.lrange(name, 0, -1)
        assert len(messages) == 10
        for message in messages:
            assert b"row number" not in message
            assert job.encode() not in message
            assert json.loads(message)["content-type"] == "application/json"
        client.rpush(name, b"no json", messages[0].replace(b"application/json", b"application/x-python-serialize"))
        found.work("--poll-seconds", "1000")
        found.finish(job)
        whole(found, job, 400)
        found.finish(found.submit(20, "more"))


def test_a_service_without_its_broker_takes_jobs_and_its_workers_find_them(tmp_path: Path) -> None:
    with running(Redis) as broker, site(tmp_path / "home", broker.url) as found:
        broker.stop()
        found.work()
        job = found.submit(40)
        found.finish(job)
        whole(found, job, 40)


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["serve", "--workers", "0..2"], "--workers 0..2 needs a Redis"),
        (["serve", "--workers", "2..1", "--broker", "redis://h"], "'2..1' is not a range"),
        (["serve", "--broker", "amqp://me:secret@host"], "'amqp://***@host' "),
        (["worker"], "A worker needs the service's Redis"),
        (["worker", "--broker", "http://host"], "is not a URL like redis://127.0.0.1:6379/0"),
        (["worker", "--broker", "redis://h", "--parts", "0"], "--parts 0 must be from 1 to 64"),
    ],
)
def test_what_is_missing_is_said(
    command: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COMPLETE_FN_BROKER", raising=False)
    assert main([*command, "--home", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert says in error
    assert "secret" not in error


def test_a_broker_is_shown_without_its_password() -> None:
    assert without_password("redis://:secret@host:1/0") == "redis://***@host:1/0"
    assert without_password("redis://host:1/0") == "redis://host:1/0"
