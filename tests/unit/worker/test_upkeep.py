"""The upkeep of a service deletes old lines of the ledger, where it is told to, and what they were stays known."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import sqlalchemy as sa

from complete_fn.engines.base import EchoEngine
from complete_fn.ledger.pruning import DAY
from complete_fn.service.engine_host import EngineHost
from complete_fn.service.state import ServiceState
from complete_fn.store.attempts import Attempt
from complete_fn.store.records import LedgerLine
from complete_fn.store.tables import ledger
from complete_fn.worker.part_runner import PartRunner
from complete_fn.worker.upkeep import Upkeep
from tests.unit.jobs.test_jobs import PIECE, job


@pytest.mark.parametrize(("days", "left"), [(None, 2), ("40", 1)])
def test_lines_of_the_ledger_are_deleted_after_the_days_that_the_service_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, days: str | None, left: int
) -> None:
    if days is not None:
        monkeypatch.setenv("COMPLETE_FN_LEDGER_DAYS", days)
    engines = EngineHost(ServiceState(tmp_path / "home", None, EchoEngine()))
    state = engines.state
    made = state.jobs.create(job("job_1"), [PIECE])
    now = state.store.now()
    with state.store.write() as connection:
        attempt = Attempt(1, made.tenant, "u", "m", f"{made.id}/0", None, "USD", "list")
        for age in (39 * DAY, 41 * DAY):
            state.store.write_lines(connection, attempt, [LedgerLine("input", 5, 50, 7)], now - age)
    Upkeep(engines, PartRunner(engines, threading.Event()), 0, "test", lambda: None).sweep()
    with state.store.read() as connection:
        assert connection.execute(sa.select(sa.func.count()).select_from(ledger)).scalar() == left
    counts = state.jobs.counts(made)
    assert (counts.prompt_tokens, counts.cost_nano) == (100, 14)
    engines.close()
