"""Worker processes with engines of their own: one worker and another's engine are killed, the broker restarts."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from complete_fn.types import CompletionRequest, SamplingParams
from deploy.servers import Redis, running
from tests.integration.server.jobs.test_server_workers import Site, site, until

MODEL = """
[models.tiny]
checkpoint = '{folder}'
default_max_tokens = 24
engine_args = {{ max_num_seqs = 16, max_num_batched_tokens = 1024 }}
prices = {{ input = 1, cached_input = 1, output = 2 }}
"""
Start = Callable[[], AbstractContextManager[tuple[Site, Redis]]]
ROWS, TOKENS = 900, 16
SEATS = 16
BOUND_SLACK = 64  # a prompt's tokens are bounded before they are counted


@pytest.fixture
def start(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """Call it for a service with two workers, and its broker."""
    monkeypatch.setenv("COMPLETE_FN_MEMORY", "0.25")
    monkeypatch.setattr("complete_fn.service.job_files.PART_ROWS", 40)

    @contextmanager
    def two_workers() -> Iterator[tuple[Site, Redis]]:
        with running(Redis) as broker, site(tmp_path / "home", broker.url, MODEL.format(folder=tiny_model)) as found:
            found.work()
            found.work()
            yield found, broker

    return two_workers


@pytest.mark.engine
@pytest.mark.long  # four starts of an engine
@pytest.mark.timeout(900)
def test_a_job_outlives_a_worker_an_engine_and_the_broker(start: Start, engine: Any) -> None:
    with start() as (found, broker):
        job = found.submit(ROWS, "row", "tiny", TOKENS)
        until(lambda: found.done(job) > 60, 400)
        until(lambda: any(beat.warm("tiny") for beat in found.beats()), 60)  # a fast worker is done before it says so
        warm = next(beat for beat in found.beats() if beat.warm("tiny"))
        os.kill(warm.pid, signal.SIGKILL)
        broker.restart(signal.SIGKILL)
        before = found.done(job)
        until(lambda: found.done(job) > before + 60, 400)
        (left,) = found.beats()
        engine_pid = left.models["tiny"].engine_pid
        assert engine_pid not in (None, warm.models["tiny"].engine_pid)
        os.kill(engine_pid, signal.SIGKILL)
        assert found.finish(job, 400)["status"] == "completed"
        now, rows = found.job_state(job), found.results(job)
    assert now["rows"] == {"total": ROWS, "done": ROWS, "failed": 0, "null": 0}
    assert [row["id"] for row in rows] == list(range(ROWS))
    used = [row["completion_details"]["usage"] for row in rows]
    assert now["usage"] == {kind: sum(row[kind] for row in used) for kind in now["usage"]}
    # Greedy and in float32: the same as from an engine that nobody disturbs.
    sampling = SamplingParams(max_tokens=TOKENS)
    asked = [CompletionRequest("tiny", f"row number {n}", sampling) for n in range(ROWS)]
    calm = dict(engine.stream(asked, ""))
    assert [row["completion"] for row in rows] == [calm[n].text for n in range(ROWS)]


@pytest.mark.engine
@pytest.mark.long  # two starts of an engine
@pytest.mark.timeout(900)
def test_a_budget_is_spent_but_for_a_reservation_a_seat_and_never_passed(needs_vllm: None, start: Start) -> None:
    tokens, cap = 200, Decimal("0.08")
    with start() as (found, _):
        job = found.submit(600, "row", "tiny", tokens, max_cost=str(cap))
        now = found.finish(job, 600)
        rows = found.results(job)
        both = [b for b in found.beats() if b.warm("tiny")]
    assert len(both) == 2
    codes = [row["completion_details"]["error"]["code"] for row in rows if row["completion_details"]["error"]]
    assert set(codes) == {"budget_exceeded"}
    assert 0 < len(codes) == now["rows"]["failed"] < 600
    spent = Decimal(now["cost"]["amount"])
    longest = max(row["completion_details"]["usage"]["prompt_tokens"] for row in rows)
    reservation = Decimal(longest + BOUND_SLACK + 2 * tokens) / 1_000_000
    print(
        f"cap {cap}, spent {spent}, left {cap - spent}: {(cap - spent) / reservation:.1f} reservations of {reservation}"
    )
    assert spent <= cap
    assert cap - spent <= 2 * SEATS * reservation
