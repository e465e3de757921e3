"""Jobs in the store: who gets which part, whose commit counts, how a job ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from complete_fn.errors import JobError, NotFoundError, StoreError
from complete_fn.jobs.job import JOB_MOVES, PART_MOVES, TRIES, Job
from complete_fn.jobs.job_store import JobStore
from complete_fn.jobs.part_queue import DEATHS, PartQueue, next_part, worker_name
from complete_fn.store.records import LedgerLine
from complete_fn.store.store import Store
from complete_fn.types import Asker
from tests.clocks import pass_time

PIECE = {"model": "m", "options": "{}", "rows": 10, "tokens": 100}


def job(name: str, tenant: str = "acme", **more: Any) -> Job:
    made = Job(
        id=name,
        tenant=tenant,
        user="u",
        kind="table",
        status="queued",
        ends_as=None,
        model="m",
        rows=20,
        nulls=0,
        max_cost_nano=None,
        currency="USD",
        basis="example",
        priority=0,
        idempotency_key=None,
        request="{}",
        query_tag=None,
        created_at=time.time(),
        started_at=None,
        ended_at=None,
        deadline=None,
        error=None,
    )
    return replace(made, **more)


@pytest.fixture
def jobs(store_url: str) -> Iterator[JobStore]:
    store = Store(store_url)
    yield JobStore(store)
    store.close()


@pytest.fixture
def queue(jobs: JobStore) -> PartQueue:
    return PartQueue(jobs.store)


ME = worker_name(0)


def test_every_status_that_can_be_reached_is_known() -> None:
    for moves in (JOB_MOVES, PART_MOVES):
        assert {s for reached in moves.values() for s in reached} <= set(moves)


def test_parts_are_claimed_in_order_and_end_their_job(jobs: JobStore, queue: PartQueue) -> None:
    jobs.create(job("a"), [PIECE, PIECE])
    first, second = queue.claim(ME), queue.claim(ME)
    assert first is not None
    assert second is not None
    assert (first.number, second.number, queue.claim(ME)) == (0, 1, None)
    assert jobs.get("acme", "a").status == "running"
    assert queue.finish(first, "done", "r0", 0)
    assert jobs.get("acme", "a").status == "running"
    assert queue.finish(second, "done", "r1", 0)
    assert jobs.get("acme", "a").status == "completed"


def test_a_job_without_work_is_completed_at_once(jobs: JobStore) -> None:
    assert jobs.create(job("a"), []).status == "completed"


def test_tenants_take_turns_and_priority_counts_within_one(jobs: JobStore, queue: PartQueue) -> None:
    jobs.create(job("big"), [PIECE] * 4)
    jobs.create(job("urgent", priority=5), [PIECE])
    jobs.create(job("other", tenant="bolt", priority=-5), [PIECE] * 2)
    order = []
    while (part := queue.claim(ME)) is not None:
        order.append(part.job)
        pass_time(jobs.store, 1)
    assert order == ["urgent", "other", "big", "other", "big", "big", "big"]


def test_a_process_goes_on_behind_its_own_part_and_another_takes_the_cheapest_cut(
    jobs: JobStore, queue: PartQueue
) -> None:
    """Six parts; what they share with the part before is least at 3. Loads count down too: who is done takes more."""
    jobs.create(job("a"), [PIECE | {"shared": s} for s in (0, 50, 50, 5, 40, 60)])
    a, b, c = "host|1|1.0|0", "host|2|2.0|0", "host|3|3.0|1"

    def claim(worker: str) -> int:
        part = queue.claim(worker)
        assert part is not None
        held.setdefault(worker, []).append(part)
        return part.number

    held: dict[str, list[Any]] = {}
    assert [claim(a), claim(b), claim(a)] == [0, 3, 1]
    assert jobs.counts(jobs.get("acme", "a")).recomputed_tokens == 5  # the cut at 3
    assert claim("host|1|1.0|7") == 2  # another thread of the process that has 1
    assert claim(b) == 4
    assert claim(c) == 5  # all that is left, though another is warm for it
    counts = jobs.counts(jobs.get("acme", "a"))
    assert (counts.parts, counts.recomputed_tokens) == (6, 5 + 60)


def test_a_part_behind_a_done_one_of_another_process_is_anybodys(jobs: JobStore, queue: PartQueue) -> None:
    jobs.create(job("a"), [PIECE | {"shared": s} for s in (0, 50, 90)])
    first = queue.claim("host|1|1.0|0")
    assert first is not None
    assert queue.claim("host|2|2.0|0").number == 2  # type: ignore[union-attr]
    assert queue.finish(first, "done", "r", 0)
    assert queue.claim("host|2|2.0|1").number == 1  # type: ignore[union-attr]
    assert jobs.counts(jobs.get("acme", "a")).recomputed_tokens == 50  # 1 and 2 are one process's, in whatever order


def test_a_claim_does_not_read_all_parts_that_were_ever_served(tmp_path: Path) -> None:
    store = Store(tmp_path / "s")
    query = next_part(time.time(), "host|1|1.0", lambda column: column == "m", ("queued",))
    with store.read() as connection:
        text = query.compile(store.engine, compile_kwargs={"literal_binds": True})
        plan = [str(row[-1]) for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {text}")]
    assert [step for step in plan if "SCAN" in step and "lately" not in step] == []
    assert any("parts_claimed (claimed_at>?)" in step for step in plan)
    store.close()


def test_a_part_is_claimed_once_by_many_threads(jobs: JobStore, queue: PartQueue) -> None:
    jobs.create(job("a"), [PIECE] * 40)
    claimed: list[int] = []

    def take(n: int) -> None:
        while (part := queue.claim(worker_name(n))) is not None:
            claimed.append(part.number)

    threads = [threading.Thread(target=take, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(claimed) == list(range(40))


def test_a_commit_after_the_lease_went_to_another_is_void(jobs: JobStore, queue: PartQueue) -> None:
    jobs.create(job("a"), [PIECE])
    late = queue.claim(ME)
    assert late is not None
    pass_time(jobs.store, 60)
    assert queue.sweep() == 1
    assert queue.lost([late]) == {late.id: "lease"}
    now = queue.claim(ME)
    assert now is not None
    assert now.claim != late.claim
    assert not queue.finish(late, "done", "stale", 3)
    queue.give_back(late, error="stale")
    queue.fail(late, "stale")
    assert queue.finish(now, "done", "fresh", 0)
    (part,) = jobs.parts("a")
    assert (part.status, part.result, part.failed) == ("done", "fresh", 0)
    assert jobs.get("acme", "a").status == "completed"


def test_renewed_leases_are_not_swept_those_of_dead_processes_at_once(jobs: JobStore, queue: PartQueue) -> None:
    jobs.create(job("a"), [PIECE, PIECE])
    mine = queue.claim(ME)
    assert mine is not None
    pass_time(jobs.store, 60)
    queue.renew([mine])
    host = ME.split("|")[0]
    assert queue.claim(f"{host}|999999999|1.0|0") is not None
    assert queue.sweep() == 1
    assert [p.status for p in jobs.parts("a")] == ["running", "queued"]


def test_the_last_try_fails_the_job_and_cancels_what_waits(jobs: JobStore, queue: PartQueue) -> None:
    jobs.create(job("a"), [PIECE, PIECE])
    for _ in range(TRIES):
        part = queue.claim(ME)
        assert part is not None
        assert part.number == 0
        queue.give_back(part, error="No memory.")
    ending = jobs.get("acme", "a")
    assert (ending.status, ending.ends_as, ending.error) == ("stopping", "failed", "No memory.")
    assert queue.claim(ME) is None
    salvage = queue.claim_stopped(ME)
    assert salvage is not None
    assert (salvage.number, salvage.tries) == (0, 0)
    queue.give_back(salvage, 60, "No storage.", salvage=True)
    assert queue.claim_stopped(ME) is None  # for a minute
    pass_time(jobs.store, 61)
    salvage = queue.claim_stopped(ME)
    assert salvage is not None
    queue.fail(salvage, "No storage.", salvage=True)
    ended = jobs.get("acme", "a")
    assert (ended.status, ended.error) == ("failed", "No memory.")
    assert [p.status for p in jobs.parts("a")] == ["failed", "cancelled"]


def test_draining_does_not_count_as_a_try(jobs: JobStore, queue: PartQueue) -> None:
    jobs.create(job("a"), [PIECE])
    for _ in range(TRIES + 2):
        part = queue.claim(ME)
        assert part is not None
        queue.give_back(part)
    assert jobs.get("acme", "a").status == "running"


def test_a_stopped_job_ends_when_its_running_part_has_let_go(jobs: JobStore, queue: PartQueue) -> None:
    jobs.create(job("a"), [PIECE, PIECE])
    part = queue.claim(ME)
    assert part is not None
    assert jobs.stop(jobs.get("acme", "a"), "cancelled").status == "stopping"
    assert queue.claim(ME) is None
    assert queue.lost([part]) == {part.id: "job"}
    assert queue.finish(part, "cancelled", "r", 1)
    ended = jobs.get("acme", "a")
    assert ended.status == "cancelled"
    with pytest.raises(JobError, match="is cancelled"):
        jobs.stop(ended, "cancelled")


def test_a_part_given_back_to_a_stopping_job_is_not_run_again(jobs: JobStore, queue: PartQueue) -> None:
    jobs.create(job("a"), [PIECE])
    part = queue.claim(ME)
    assert part is not None
    jobs.stop(jobs.get("acme", "a"), "cancelled")
    queue.give_back(part)
    assert queue.claim(ME) is None


def test_a_job_expires_at_its_deadline(jobs: JobStore) -> None:
    jobs.create(job("a", deadline=time.time() + 10), [PIECE])
    jobs.create(job("b"), [PIECE])
    assert jobs.expire() == []
    pass_time(jobs.store, 11)
    assert jobs.expire() == ["a"]
    assert (jobs.get("acme", "a").status, jobs.get("acme", "b").status) == ("expired", "queued")


def test_jobs_of_other_tenants_are_not_there(jobs: JobStore) -> None:
    jobs.create(job("a"), [PIECE])
    with pytest.raises(NotFoundError):
        jobs.get("bolt", "a")
    assert jobs.newest("bolt", "table", 10, None) == []


def test_pages_go_on_behind_the_last_one_seen(jobs: JobStore) -> None:
    for n in range(5):
        jobs.create(job(f"j{n}", created_at=float(n // 2)), [PIECE])
    first = jobs.newest("acme", "table", 2, None)
    second = jobs.newest("acme", "table", 9, first[-1].id)
    assert [j.id for j in first + second] == ["j4", "j3", "j2", "j1", "j0"]


def test_two_submissions_with_one_idempotency_key_make_one_job(jobs: JobStore) -> None:
    made: list[str] = []

    def submit(n: int) -> None:
        made.append(jobs.create(job(f"j{n}", idempotency_key="k"), [PIECE]).id)

    threads = [threading.Thread(target=submit, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(made)) == 1
    with pytest.raises(JobError, match="idempotency key"):
        jobs.create(job("x", idempotency_key="k", request='{"other": 1}'), [PIECE])
    assert jobs.create(job("y", tenant="bolt", idempotency_key="k"), [PIECE]).id == "y"


def test_what_a_part_committed_before_its_job_was_stopped_is_asked_for(jobs: JobStore, queue: PartQueue) -> None:
    jobs.create(job("a"), [PIECE, PIECE])
    begun = queue.claim(ME)
    assert begun is not None
    queue.give_back(begun, delay=60)
    assert queue.claim_stopped(ME) is None
    assert jobs.stop(jobs.get("acme", "a"), "cancelled").status == "stopping"
    pass_time(jobs.store, 90)
    assert queue.claim(ME) is None
    again = queue.claim_stopped(ME)
    assert again is not None
    assert again.number == 0
    assert again.claim != begun.claim
    assert queue.claim_stopped(ME) is None
    assert queue.finish(again, "cancelled", "r0", 1)
    assert jobs.get("acme", "a").status == "cancelled"
    assert [p.status for p in jobs.parts("a")] == ["cancelled", "cancelled"]


def test_a_run_whose_part_was_swept_commits_nothing_more(jobs: JobStore, queue: PartQueue) -> None:
    jobs.create(job("a"), [PIECE])
    part = queue.claim(ME)
    assert part is not None
    attempt = jobs.store.begin(Asker("acme", job=part.name), "m", "USD", "example")
    jobs.store.admit(attempt, 3, 30)
    pass_time(jobs.store, 60)
    queue.sweep()
    with pytest.raises(StoreError, match="given up as lost"):
        jobs.store.commit(attempt, [], [LedgerLine("input", 3, 30, 30)], 3, 30)
    assert jobs.counts(jobs.get("acme", "a")).cost_nano == 0


def test_a_part_that_kills_every_worker_fails_its_job(jobs: JobStore, queue: PartQueue) -> None:
    jobs.create(job("a"), [PIECE])
    for _ in range(DEATHS):
        part = queue.claim(ME)
        assert part is not None
        jobs.store.begin(Asker("acme", job=part.name), "m", "USD", "example")
        assert jobs.get("acme", "a").status == "running"
        pass_time(jobs.store, 100)
        queue.sweep()
    ended = jobs.get("acme", "a")
    assert (ended.status, ended.ends_as) == ("stopping", "failed")
    assert "10 workers in a row died" in (ended.error or "")
