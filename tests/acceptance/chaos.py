"""A fleet of real processes on servers of its own, and faults to throw at it on a schedule."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import sqlalchemy as sa

from complete_fn.errors import StoreError
from complete_fn.jobs.queue import CeleryQueue
from complete_fn.jobs.worker_store import Beat, WorkerStore
from complete_fn.store.job_tables import parts
from complete_fn.store.store import Store
from complete_fn.store.tables import ledger, of_class
from deploy.servers import Postgres, Redis, end_with_parent, free_port, running

LOOK_SECONDS = 0.2
START_SECONDS = 120.0
SEED = 5


@dataclass
class Site:
    """One API and two workers, each restarted when it dies, over one PostgreSQL and one Redis."""

    home: Path
    postgres: Postgres
    redis: Redis
    port: int
    environment: dict[str, str]
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    faults: Counter[str] = field(default_factory=Counter)
    closing: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.store = Store(self.environment["COMPLETE_FN_DATABASE"])
        self.beats = WorkerStore(self.store)

    # -- processes -----------------------------------------------------------------------------------------------

    def command(self, name: str) -> list[str]:
        verb = ["serve", "--port", str(self.port)] if name == "api" else ["worker", "--poll-seconds", "2"]
        return [sys.executable, "-m", "complete_fn", *verb, "--home", str(self.home)]

    def environment_of(self, name: str) -> dict[str, str]:
        return self.environment

    def port_of_api(self) -> int:
        return self.port

    def start(self, name: str) -> None:
        with (self.home / f"{name}.log").open("ab") as log:
            child = subprocess.Popen(
                self.command(name), env=self.environment_of(name), stdout=log, stderr=log, preexec_fn=end_with_parent
            )
        self.processes[name] = child

    def supervise(self) -> None:
        """What an operator's process manager does: start again what has ended."""
        while not self.closing.wait(LOOK_SECONDS):
            with self.lock:
                for name, child in list(self.processes.items()):
                    if child.poll() is not None and not self.closing.is_set():
                        self.start(name)

    def end(self) -> None:
        with self.lock:
            self.closing.set()
            for child in self.processes.values():
                child.kill()
                child.wait()
        self.store.close()

    # -- what a client does --------------------------------------------------------------------------------------

    def ask(self, method: str, path: str, **given: Any) -> httpx.Response:
        """An answer from the API, asked again while it is down or its database is."""
        end = time.monotonic() + START_SECONDS
        while True:
            with suppress(httpx.TransportError):
                answer = httpx.request(method, f"http://127.0.0.1:{self.port_of_api()}{path}", timeout=30, **given)
                if answer.status_code < 500:
                    return answer
            assert time.monotonic() < end, f"{method} {path} is not answered"
            time.sleep(LOOK_SECONDS)

    def upload(self, texts: list[str]) -> str:
        lines = "\n".join(json.dumps({"id": n, "text": text}) for n, text in enumerate(texts))
        files = {"file": ("rows.jsonl", lines)}
        return str(self.ask("POST", "/v1/files", files=files, data={"purpose": "user_data"}).json()["id"])

    def submit(self, file: str, key: str, model: str, options: dict[str, Any]) -> str:
        body = {"model": model, "prompt": "{text}", "source": {"file_id": file}, "options": options}
        answer = self.ask("POST", "/v1/jobs", json=body, headers={"Idempotency-Key": key})
        assert answer.status_code in (200, 201, 202), answer.text
        return str(answer.json()["id"])

    def state(self, job: str, **given: Any) -> dict[str, Any]:
        found: dict[str, Any] = self.ask("GET", f"/v1/jobs/{job}", **given).json()
        return found

    def finished(self, job: str, seconds: float, **given: Any) -> tuple[dict[str, Any], float]:
        """The job's last state, and how long it took from now."""
        began = time.monotonic()
        while (now := self.state(job, **given))["status"] in ("queued", "running", "stopping"):
            assert time.monotonic() - began < seconds, f"stuck: {now}"
            time.sleep(LOOK_SECONDS)
        return now, time.monotonic() - began

    def results(self, job: str) -> list[dict[str, Any]]:
        answer = self.ask("GET", f"/v1/jobs/{job}/results", params={"format": "jsonl", "details": True})
        return [json.loads(line) for line in answer.text.splitlines()]

    # -- faults --------------------------------------------------------------------------------------------------

    def alive(self) -> list[Beat]:
        try:
            return self.beats.alive()
        except StoreError:
            return []

    def kill(self, name: str) -> None:
        with self.lock:
            self.processes[name].kill()
            self.processes[name].wait()

    def kill_engine(self, choose: random.Random) -> None:
        pids = [state.engine_pid for beat in self.alive() for state in beat.models.values() if state.engine_pid]
        if pids:
            with suppress(ProcessLookupError):
                os.kill(choose.choice(pids), signal.SIGKILL)

    def steal_leases(self) -> None:
        """As if every worker had been silent for too long: their parts are given to others while they still run."""
        with suppress(StoreError), self.store.write() as connection:
            held = parts.c.status == "running"
            connection.execute(parts.update().where(held).values(lease_until=0.0))

    def redeliver(self, model: str) -> None:
        CeleryQueue(self.redis.url).announce({model: 8})

    def throw(self, fault: str, choose: random.Random, model: str, again: Callable[[], object]) -> None:
        self.faults[fault] += 1
        match fault:
            case "worker killed":
                self.kill(choose.choice(["worker-1", "worker-2"]))
            case "engine killed":
                self.kill_engine(choose)
            case "API killed":
                self.kill("api")
            case "Redis restarted":
                self.redis.restart(signal.SIGKILL, pause=0.5)
            case "PostgreSQL restarted":
                self.postgres.restart(signal.SIGQUIT, pause=0.5)
            case "messages redelivered":
                self.redeliver(model)
            case "leases stolen":
                self.steal_leases()
            case "job submitted again":
                again()


FAULTS = (
    "worker killed",
    "engine killed",
    "API killed",
    "Redis restarted",
    "PostgreSQL restarted",
    "messages redelivered",
    "leases stolen",
    "job submitted again",
)


@contextmanager
def site(home: Path, models: str, settings: dict[str, str]) -> Iterator[Site]:
    home.mkdir(parents=True)
    (home / "models.toml").write_text(models)
    with ExitStack() as stack:
        postgres, redis = stack.enter_context(running(Postgres)), stack.enter_context(running(Redis))
        environment = {
            **os.environ,
            **settings,
            "COMPLETE_FN_DATABASE": postgres.url,
            "COMPLETE_FN_BROKER": redis.url,
            "COMPLETE_FN_MODELS": str(home / "models.toml"),
        }
        found = Site(home, postgres, redis, free_port(), environment)
        stack.callback(found.end)
        for name in ("api", "worker-1", "worker-2"):
            found.start(name)
        threading.Thread(target=found.supervise, daemon=True).start()
        found.ask("GET", "/readyz")
        yield found


def schedule(pauses: tuple[float, float], choose: random.Random) -> Iterator[tuple[float, str]]:
    """Without end: a pause (seconds, drawn from-to) and the fault after it; all kinds in turn, shuffled."""
    while True:
        for fault in choose.sample(FAULTS, len(FAULTS)):
            yield choose.uniform(*pauses), fault


class Chaos:
    """Throws the faults of a schedule until it is left."""

    def __init__(self, at: Site, model: str, pauses: tuple[float, float], again: Callable[[], object]) -> None:
        self.at, self.model, self.pauses, self.again = at, model, pauses, again
        self.choose = random.Random(SEED)
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.go, daemon=True)
        self.failure: BaseException | None = None

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join(START_SECONDS)
        if self.failure is not None:
            raise self.failure

    def go(self) -> None:
        try:
            for pause, fault in schedule(self.pauses, self.choose):
                if self.over.wait(pause):
                    return
                self.at.throw(fault, self.choose, self.model, self.again)
        except BaseException as error:
            self.failure = error


def committed_usage(site: Site) -> sa.RowMapping:
    """Billed tokens of the whole ledger: input with cached input, and output."""
    prompts = of_class(ledger.c.tokens, "input", "cached_input").label("cached_input")
    answers = of_class(ledger.c.tokens, "output").label("output")
    with site.store.read() as connection:
        return connection.execute(sa.select(prompts, answers)).mappings().one()
