"""All hosts go by the database's clock: a host whose own clock is wrong says so and disturbs nobody."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import pytest
import sqlalchemy as sa

from complete_fn.errors import StoreUpgradedError
from complete_fn.store.clock import DatabaseClock
from complete_fn.store.records import LedgerLine
from complete_fn.store.store import Store
from complete_fn.store.tables import attempts, ledger
from complete_fn.types import Asker


@pytest.mark.parametrize("shift", [60.0, -3600.0])
def test_a_host_whose_clock_is_wrong_goes_by_the_databases(
    postgres_url: str, shift: float, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + shift)
    with caplog.at_level(logging.WARNING, "complete_fn.store"):
        store = Store(postgres_url)
    assert abs(store.now() - real()) < 2
    told = [r.getMessage() for r in caplog.records]
    assert len(told) == 1
    assert f"{abs(shift):.1f} s {'ahead of' if shift > 0 else 'behind'} the database's" in told[0]
    attempt = store.begin(Asker(), "m", "USD", "x")
    store.commit(attempt, [], [LedgerLine("input", 1, 1)], 0, 0)
    with store.read() as connection:
        times = [connection.execute(sa.select(c)).scalar_one() for c in (attempts.c.began, ledger.c.at)]
    assert all(abs(at - real()) < 5 for at in times)
    monkeypatch.undo()
    assert store.database.clock.difference() is None
    store.close()


def test_a_clock_is_compared_again_when_a_minute_is_over(postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(postgres_url)
    clock = store.database.clock
    assert isinstance(clock, DatabaseClock)
    assert clock.epoch is not None
    clock.epoch += 500  # as if this host's timer had run away
    store.ping()
    assert clock.now() - time.time() > 400
    monkeypatch.setattr("complete_fn.store.clock.MEASURE_SECONDS", 0.0)
    clock.due = 0.0
    store.ping()
    assert abs(clock.now() - time.time()) < 2
    store.close()


def test_a_local_store_goes_by_the_machines_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path / "state.sqlite3")
    monkeypatch.setattr(time, "time", lambda: 5.0)
    assert store.now() == 5.0
    assert store.database.clock.difference() is None


def test_a_process_of_an_older_version_begins_nothing_in_an_upgraded_store(store_url: str) -> None:
    store = Store(store_url)
    running = store.begin(Asker(), "m", "USD", "x")
    with store.write() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9001'"))
    with pytest.raises(StoreUpgradedError, match="restart it"):
        store.begin(Asker(), "m", "USD", "x")
    assert store.is_outdated
    store.commit(running, [], [LedgerLine("input", 1, 1)], 0, 0)  # what it has begun is not lost
    store.finish(running, "done")
    store.close()
