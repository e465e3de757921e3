"""Leases, claims and repeats of the service, at the moments when two processes meet."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from complete_fn import EchoEngine
from complete_fn.engines.prices import nano
from complete_fn.engines.throughput import Watch
from complete_fn.errors import EngineError, InputError, StoreError, StoreLostError
from complete_fn.host import here
from complete_fn.jobs.api_keys import Principal
from complete_fn.jobs.job import Job, Part
from complete_fn.jobs.part_queue import worker_name
from complete_fn.rows import readers as windows
from complete_fn.service.delivery import LeaseLost, claim, move
from complete_fn.service.engine_host import EngineHost
from complete_fn.service.rerun import rerun
from complete_fn.service.results import result_windows
from complete_fn.service.sinks import promise
from complete_fn.service.state import ServiceState
from complete_fn.service.submit import TableSpec, submit_table
from complete_fn.store.tables import attempts
from complete_fn.types import Asker, Completion, CompletionRequest
from complete_fn.worker.loop import WorkerLoop
from complete_fn.worker.part_runner import Hand
from tests.clocks import pass_time
from tests.integration.server.conftest import write_models
from tests.integration.server.jobs.test_server_jobs import parquet_bytes

DEAD = f"{here()}|999999|1.0|0"  # no process


@pytest.fixture
def engines(tmp_path: Path, store_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[EngineHost]:
    if store_url.startswith("postgresql"):
        monkeypatch.setenv("COMPLETE_FN_DATABASE", store_url)
    engines = EngineHost(ServiceState(tmp_path / "home", write_models(tmp_path), EchoEngine()))
    yield engines
    engines.close()


@pytest.fixture
def state(engines: EngineHost) -> ServiceState:
    return engines.state


def submit(state: ServiceState, rows: int, different: int | None = None, who: str = "local", **more: Any) -> Job:
    path = state.folder / "in.parquet"
    path.write_bytes(parquet_bytes([{"text": f"row {(n + 3) % (different or rows)}"} for n in range(rows)]))
    with path.open("rb") as source:
        file = state.uploads.save(who, "in.parquet", "user_data", source)
    return submit_table(
        state, Principal(who), TableSpec("echo", "{text}", {"file_id": file.id}, **{"options": {}, **more})
    )


def status_of(state: ServiceState, attempt: int) -> str:
    with state.store.read() as connection:
        return str(connection.execute(sa.select(attempts.c.status).where(attempts.c.id == attempt)).scalar())


def test_a_sweeper_that_comes_late_leaves_the_next_holder_alone(state: ServiceState) -> None:
    submit(state, 5)
    state.parts.claim(DEAD)
    (seen,) = state.parts.running()
    assert state.parts.sweep() == 1
    part = state.parts.claim(worker_name(0))
    assert part is not None
    attempt = state.store.begin(Asker(job=part.name, claim=(part.id, part.claim or "")), "echo", "USD", "x")
    assert not state.parts.take_back(seen, None)
    assert not state.parts.lost([part])
    state.store.touch(attempt)


def test_a_renewed_lease_is_not_swept(state: ServiceState) -> None:
    submit(state, 5)
    part = state.parts.claim(worker_name(0))
    assert part is not None
    (seen,) = state.parts.running()
    pass_time(state.store, 60)
    state.parts.renew([part])
    assert not state.parts.take_back(seen, None)
    assert not state.parts.lost([part])


def test_nobody_begins_a_part_that_was_given_to_another(state: ServiceState) -> None:
    submit(state, 5)
    part = state.parts.claim(worker_name(0))
    assert part is not None
    pass_time(state.store, 60)
    assert state.parts.sweep() == 1
    with pytest.raises(StoreError, match="given up as lost"):
        state.store.begin(Asker(job=part.name, claim=(part.id, part.claim or "")), "echo", "USD", "x")
    with state.store.read() as connection:
        assert connection.execute(sa.select(sa.func.count()).select_from(attempts)).scalar() == 0


def test_a_job_whose_commit_was_not_answered_is_there_once_and_whole(
    state: ServiceState, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit(state, 5)  # neither has an idempotency key
    real, lost = state.store.write, []

    @contextmanager
    def write() -> Iterator[sa.Connection]:
        with real() as connection:
            yield connection
            of_job = connection.execute(sa.text("SELECT count(*) FROM jobs")).scalar() == 2
        if of_job and not lost:
            lost.append(True)
            raise StoreLostError("the answer to COMMIT was lost")

    monkeypatch.setattr(state.store, "write", write)
    job = submit(state, 50)
    assert lost
    assert job.rows == 50
    assert len(state.jobs.newest("local", "table", 9, None)) == 2
    assert any("part-" in key for key in state.storage.keys(state.job_key(job.id)))


def test_a_store_that_cannot_tell_keeps_the_objects_of_a_job(
    state: ServiceState, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(*_: Any) -> None:
        raise StoreError("away")

    monkeypatch.setattr(state.jobs, "create", lost)
    monkeypatch.setattr(state.jobs, "get", lost)
    with pytest.raises(StoreError):
        submit(state, 5)
    assert state.storage.keys("jobs")
    monkeypatch.undo()
    kept = len(state.storage.keys("jobs"))
    monkeypatch.setattr(state.jobs, "create", lost)
    with pytest.raises(StoreError):
        submit(state, 5)
    assert len(state.storage.keys("jobs")) == kept


def test_a_rerun_takes_the_delivery_from_who_still_writes(
    state: ServiceState, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    monkeypatch.setattr(state, "settings", replace(state.settings, sinks=(str(folder),)))
    job = submit(state, 5, sink={"uri": f"{folder}/r.parquet"})
    part = state.parts.claim(worker_name(0))
    assert part is not None
    state.parts.finish(part, "done", "x", 0)
    first = claim(state)
    assert first is not None
    with state.store.write() as connection:
        promise(connection, job)
    second = claim(state)
    assert second is not None
    assert second.claim != first.claim
    with pytest.raises(LeaseLost):
        move(state, first, status="written", error=None)


def test_upkeep_frees_what_the_dead_have_reserved(state: ServiceState, engines: EngineHost) -> None:
    attempt = state.store.begin(Asker(), "echo", "USD", "x")
    with state.store.write() as connection:
        connection.execute(attempts.update().values(pid=999999, pid_started=1.0))
    WorkerLoop(engines).upkeep.sweep()
    assert status_of(state, attempt.id) == "lost"


class Dying(EchoEngine):
    """Answers so many rows and then, until it is mended, none."""

    def __init__(self, left: int) -> None:
        super().__init__(remembers=False)
        self.left = left

    def stream(self, requests: Iterable[CompletionRequest], tenant: str) -> Iterator[tuple[int, Completion]]:
        for position, request in enumerate(requests):
            if not self.left:
                raise EngineError("the card fell off the bus")
            self.left -= 1
            yield position, self.complete(request)


def run_to_end(engines: EngineHost, job: Job, seconds: float = 60.0) -> Job:
    loop = WorkerLoop(engines, 1, poll_seconds=0.1)
    loop.start()
    until = time.monotonic() + seconds
    while not (now := engines.state.jobs.get(job.tenant, job.id)).over and time.monotonic() < until:
        time.sleep(0.02)
    loop.close()
    return now


def rows_of(state: ServiceState, job: Job) -> list[dict[str, Any]]:
    windows = result_windows(state, job, True, job.status != "completed")
    return [row for _, new, _ in windows for row in new["completion_details"].to_pylist()]


def test_a_job_that_fails_keeps_what_was_paid_and_a_rerun_pays_for_the_rest(
    state: ServiceState, engines: EngineHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("complete_fn.worker.part_runner.RETRY_SECONDS", 0.02)
    engine = Dying(150)
    state.engine = engine
    job = submit(state, 200, options={"temperature": 0.7})  # no answer is shared with other jobs
    failed = run_to_end(engines, job)
    assert (failed.status, failed.error) == ("failed", "the card fell off the bus")
    assert sum(row["error"] is None for row in rows_of(state, failed)) == 150
    engine.left = 1_000
    done = run_to_end(engines, rerun(state, failed))
    assert done.status == "completed"
    assert all(row["error"] is None for row in rows_of(state, done))
    assert engine.left == 1_000 - 50


def test_the_rows_costs_add_up_to_the_bill_of_a_job_that_changed_hands(
    state: ServiceState, engines: EngineHost
) -> None:
    state.engine = EchoEngine(row_seconds=0.01)
    job = submit(state, 200)
    loop = WorkerLoop(engines, 1)
    loop.start()
    time.sleep(1.5)
    loop.close()
    counts = state.jobs.counts(state.jobs.get("local", job.id))
    assert 0 < counts.done < 200
    done = run_to_end(engines, job)
    rows = rows_of(state, done)
    assert nano(sum(row["cost"] for row in rows)) == state.jobs.counts(done).cost_nano
    assert {row["source"] for row in rows} == {"computed"}


def test_a_storage_that_is_away_for_seconds_costs_no_job(
    state: ServiceState, engines: EngineHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("complete_fn.worker.part_runner.RETRY_SECONDS", 0.02)
    job = submit(state, 20)
    real, refused = state.storage.writing, []

    @contextmanager
    def writing(key: str) -> Iterator[Any]:
        if "result-" in key and len(refused) < 5:
            refused.append(key)
            raise StoreError("The storage cannot be used: 503 SlowDown")
        with real(key) as file:
            yield file

    monkeypatch.setattr(state.storage, "writing", writing)
    assert run_to_end(engines, job).status == "completed"
    assert len(refused) == 5


def test_a_sinks_key_that_comes_again_in_a_later_window_is_refused_at_once(
    state: ServiceState, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(windows, "WINDOW_ROWS", 10)
    monkeypatch.setattr(windows, "BATCH_ROWS", 5)
    monkeypatch.setenv("SINK_URL", f"sqlite:///{tmp_path}/sink.db")
    state.connections.add("local", "mine", "SINK_URL", True)
    sink = {"connection": "mine", "table": "answers", "key": "text"}
    assert submit(state, 30, sink=sink).rows == 30
    with pytest.raises(InputError, match="'row 3' more than once"):
        submit(state, 30, sink=sink, different=20)
    assert len(state.jobs.newest("local", "table", 9, None)) == 1


def test_a_slow_storage_holds_up_no_lease_and_no_heartbeat(
    state: ServiceState, engines: EngineHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    cleaning, end, beats = threading.Event(), threading.Event(), []

    def slow(_: ServiceState) -> None:
        cleaning.set()
        end.wait(30)

    monkeypatch.setattr("complete_fn.worker.upkeep.expire", slow)
    monkeypatch.setattr("complete_fn.worker.loop.RENEW_SECONDS", 0.1)
    monkeypatch.setattr("complete_fn.worker.loop.BEAT_SECONDS", 0.1)
    state.engine = EchoEngine(row_seconds=0.02)
    submit(state, 200)
    loop = WorkerLoop(engines, 1, tell=beats.append)
    loop.start()
    assert cleaning.wait(10)
    while not state.parts.running():
        time.sleep(0.02)
    (part,) = state.parts.running()
    told = len(beats)
    time.sleep(1.5)
    (later,) = state.parts.running()
    assert later.lease_until > part.lease_until
    assert len(beats) > told
    end.set()
    loop.close()


def test_a_part_that_is_claimed_while_others_are_looked_after_goes_on(
    state: ServiceState, engines: EngineHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit(state, 5)
    loop, real = WorkerLoop(engines), state.parts.lost
    part = state.parts.claim(worker_name(0))
    assert part is not None
    hand = Hand(part, Watch())

    def lost(held: Sequence[Part]) -> dict[int, str]:
        loop.runner.hands[part.claim] = hand
        return real(held)

    monkeypatch.setattr(state.parts, "lost", lost)
    loop.look()
    assert not hand.stop.is_set()
    loop.look()
    assert not hand.stop.is_set()
