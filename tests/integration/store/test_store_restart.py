"""A PostgreSQL that restarts under a run: every slice is there once, whatever answer was lost."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from complete_fn.engines.base import EchoEngine
from complete_fn.engines.call import Call
from complete_fn.engines.catalogue import Model
from complete_fn.errors import StoreError, StoreLostError
from complete_fn.execution.admission import Tools
from complete_fn.execution.runner import run
from complete_fn.jobs.job_store import JobStore
from complete_fn.jobs.part_queue import PartQueue, worker_name
from complete_fn.store.attempts import StoredAnswer
from complete_fn.store.records import LedgerLine
from complete_fn.store.store import Store
from complete_fn.store.tables import answers, attempts, ledger
from complete_fn.text import text_column
from complete_fn.types import Asker, Completion, CompletionRequest, Usage
from deploy.servers import Postgres, running
from tests.unit.jobs.test_jobs import PIECE, job

MODEL = Model("m", "m", engine="echo")


class Forgetful(Store):
    """Every commit succeeds; of every second one the answer is lost."""

    writes = 0

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        with super().write() as connection:
            yield connection
        self.writes += 1
        if self.writes % 2:
            raise StoreLostError("The answer to COMMIT was lost.")


def rows_of(store: Store, table: sa.Table) -> list[dict[str, Any]]:
    with store.read() as connection:
        return [dict(r) for r in connection.execute(sa.select(table)).mappings()]


@pytest.fixture
def forgetful(store_url: str) -> Iterator[Forgetful]:
    Store(store_url).close()
    opened = Forgetful(store_url)
    yield opened
    opened.close()


def test_a_commit_whose_answer_was_lost_is_not_made_twice(forgetful: Forgetful) -> None:
    store = forgetful
    attempt = store.begin(Asker(), "m", "USD", "example")
    for n in range(5):
        store.admit(attempt, 2, 20)
        done = StoredAnswer(n.to_bytes(32, "big"), Completion("x", usage=Usage(3, 0, 1)))
        store.commit(attempt, [done], [LedgerLine("input", 1, 3, 5)], 1, 10)
    store.finish(attempt, "cancelled")
    lines = rows_of(store, ledger)
    assert [(x["price_class"], x["rows"], x["tokens"]) for x in lines] == [("input", 1, 3)] * 5 + [("lost", 5, 50)]
    (kept,) = rows_of(store, attempts)
    assert (kept["status"], kept["step"]) == ("cancelled", 10)
    assert len(rows_of(store, answers)) == 5


def test_a_part_whose_claim_and_commit_lost_their_answers_is_claimed_and_committed(forgetful: Forgetful) -> None:
    jobs, queue = JobStore(forgetful), PartQueue(forgetful)
    made = jobs.create(job("a", idempotency_key="k"), [PIECE])
    assert made.id == jobs.create(job("b", idempotency_key="k"), [PIECE]).id == "a"
    part = queue.claim(worker_name(0))
    assert part is not None
    assert queue.finish(part, "done", "r", 0)
    assert jobs.get("acme", "a").status == "completed"
    assert not queue.finish(part, "done", "another", 0)


def test_an_attempt_that_was_given_up_commits_nothing_more(store_url: str) -> None:
    store = Store(store_url)
    attempt = store.begin(Asker(), "m", "USD", "example")
    store.admit(attempt, 5, 50)
    with store.write() as connection:
        connection.execute(attempts.update().values(host="another", seen_at=time.time() - 3600))
    assert store.sweep() == 1
    with pytest.raises(StoreError, match="given up as lost"):
        store.commit(attempt, [], [LedgerLine("input", 5, 50, 5)], 5, 50)
    assert [x["price_class"] for x in rows_of(store, ledger)] == ["lost"]
    store.close()


class Slow(EchoEngine):
    def complete(self, request: CompletionRequest) -> Completion:
        time.sleep(0.002)
        return super().complete(request)


def test_a_run_outlives_restarts_of_its_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("complete_fn.execution.commits.SLICE_SECONDS", 0.1)
    prompts = text_column([f"prompt {n}" for n in range(3000)])
    with running(Postgres) as server, server.database() as url:
        store, over = Store(url), threading.Event()

        def restart() -> None:
            while not over.wait(1.0):
                server.restart(signal.SIGQUIT)

        chaos = threading.Thread(target=restart)
        chaos.start()
        try:
            found = run(Call(MODEL), prompts, Tools(Slow(), store), Asker(job="j"))
        finally:
            over.set()
            chaos.join()
        assert found.text.to_pylist() == [f"prompt {n}" for n in range(3000)]
        lines, kept = rows_of(store, ledger), rows_of(store, answers)
        assert len(kept) == 3000
        assert {x["price_class"] for x in lines} == {"input", "output"}
        assert sum(x["rows"] for x in lines if x["price_class"] == "input") == 3000
        assert sum(x["tokens"] for x in lines) == sum(r["prompt_tokens"] + r["completion_tokens"] for r in kept)
        store.close()
