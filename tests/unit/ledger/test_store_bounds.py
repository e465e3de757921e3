"""Stored answers stay within their age and size, and go oldest first; the ledger stays."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from complete_fn.engines.base import EchoEngine
from complete_fn.errors import InvalidOptionError
from complete_fn.ledger.pruning import DAY, GIB, HOUR, clear, prune, used_bytes
from complete_fn.ledger.usage import mean_output
from complete_fn.session import Session
from complete_fn.settings import load_settings
from complete_fn.store.attempts import StoredAnswer
from complete_fn.store.records import LedgerLine
from complete_fn.store.sqlite_backend import SqliteBackend
from complete_fn.store.store import Store
from complete_fn.store.tables import answers, attempts, ledger
from complete_fn.types import Asker, Completion
from tests.clocks import pass_time

NOW = time.time()


@pytest.fixture
def store(store_url: str) -> Iterator[Store]:
    opened = Store(store_url)
    yield opened
    opened.close()


def fill(store: Store, count: int, size: int, days_old: float, job: str | None = None, model: str = "m") -> None:
    attempt = store.begin(Asker(job=job), model, "USD", "example")
    first = count_of(store, answers)
    made = [StoredAnswer((first + n).to_bytes(32, "big"), Completion("x" * size), job) for n in range(count)]
    store.commit(attempt, made, [LedgerLine("input", count, count)], 0, 0)
    with store.write() as connection:
        connection.execute(
            answers.update().where(answers.c.attempt == attempt.id).values(created_at=NOW - days_old * DAY)
        )
        connection.execute(attempts.update().where(attempts.c.id == attempt.id).values(began=NOW - days_old * DAY))
    store.finish(attempt, "cancelled")


def count_of(store: Store, table: sa.Table, *where: Any) -> int:
    with store.read() as connection:
        return connection.execute(sa.select(sa.func.count()).select_from(table).where(*where)).scalar_one()


def test_old_answers_go_and_the_ledger_stays(store: Store) -> None:
    fill(store, 10, 10, days_old=200)
    fill(store, 7, 10, days_old=100)
    assert prune(store, 2, 180) == 10
    assert count_of(store, answers) == 7
    assert count_of(store, ledger) == 2


def test_the_oldest_go_until_the_file_fits_and_its_space_is_given_back(store: Store) -> None:
    fill(store, 3000, 1000, days_old=3)
    fill(store, 3000, 1000, days_old=2)
    fill(store, 3000, 1000, days_old=1)
    bound = 0.6 * used_bytes(store) / GIB
    prune(store, bound, 180)
    assert used_bytes(store) <= bound * GIB
    assert count_of(store, answers, answers.c.created_at < NOW - 2.5 * DAY) == 0
    assert count_of(store, answers, answers.c.created_at > NOW - 1.5 * DAY) == 3000
    store.close()
    if isinstance(store.database, SqliteBackend):
        assert store.path.stat().st_size <= bound * GIB


def test_an_unfinished_jobs_answers_stay_for_thirty_days(store: Store) -> None:
    fill(store, 4, 10, days_old=29, job="young")
    fill(store, 5, 10, days_old=31, job="old")
    fill(store, 6, 10, days_old=29)
    prune(store, 1e-9, 20)
    assert count_of(store, answers, answers.c.job == "young") == count_of(store, answers) == 4
    assert store.unfinished("local", "young")[0]
    assert not store.unfinished("local", "old")[0]


def test_at_most_once_an_hour(store: Store) -> None:
    fill(store, 1, 10, days_old=200)
    assert prune(store, 2, 180) == 1
    fill(store, 1, 10, days_old=200)
    pass_time(store, HOUR - 5)
    assert prune(store, 2, 180) == 0
    pass_time(store, 10)
    assert prune(store, 2, 180) == 1


def test_a_session_prunes_as_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = Store(tmp_path / "state.sqlite3")
    fill(before, 3, 10, days_old=5)
    before.close()
    monkeypatch.setenv("COMPLETE_FN_CACHE_DAYS", "4")
    session = Session(engine=EchoEngine(), home=tmp_path)
    assert count_of(session.store, answers) == 0
    session.close()


@pytest.mark.parametrize("text", ["two", "-1", "0", "nan"])
def test_bounds_that_are_no_bounds_are_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPLETE_FN_CACHE_GIB", text)
    with pytest.raises(InvalidOptionError, match=f"COMPLETE_FN_CACHE_GIB='{text}'"):
        load_settings()


def test_clear_takes_what_it_is_told(store: Store) -> None:
    fill(store, 2, 10, days_old=9, model="a")
    fill(store, 3, 10, days_old=1, model="a")
    fill(store, 4, 10, days_old=9, model="b")
    assert clear(store, "a", NOW - 5 * DAY) == 2
    assert clear(store, "b") == 4
    assert clear(store) == 3
    assert count_of(store, ledger) == 3


def test_clear_shrinks_the_file(tmp_path: Path) -> None:
    store = Store(tmp_path / "s")
    fill(store, 5000, 1000, days_old=1)
    before = used_bytes(store)
    clear(store)
    store.close()
    assert store.path.stat().st_size < before / 10


def test_the_lengths_of_one_tenants_answers_tell_another_nothing(tmp_path: Path) -> None:
    with_answers = Session(engine=EchoEngine(64), home=tmp_path, who=Asker("acme", "ann"))
    with_answers.complete("m", [f"a b c {n}" for n in range(25)])
    assert mean_output(with_answers.store, "m", "acme") == 4
    assert mean_output(with_answers.store, "m", "bolt") is None
