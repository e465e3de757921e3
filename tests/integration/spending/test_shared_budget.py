"""Caps that several processes share are never passed, and what is billed is what was committed, whatever is killed."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from decimal import Decimal
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from complete_fn.engines.base import EchoEngine
from complete_fn.engines.call import Call
from complete_fn.engines.catalogue import Model, Prices
from complete_fn.engines.prices import amount, nano
from complete_fn.execution.admission import Tools
from complete_fn.execution.runner import run
from complete_fn.spending.shared_budget import SharedBudget, day_cap, job_cap
from complete_fn.store.budget_holds import day_budget
from complete_fn.store.store import Store
from complete_fn.store.tables import answers, attempts, budgets, ledger, reservations
from complete_fn.text import text_column
from complete_fn.types import Asker, Completion, CompletionRequest, SamplingParams, Usage

PRICES = Prices(Decimal("1"), Decimal("0.5"), Decimal("10"))
MODEL = Model("m", "m", engine="echo", prices=PRICES, default_max_tokens=20)
CALL = Call(MODEL, SamplingParams(max_tokens=20))
COST = amount(PRICES, Usage(10, 0, 10))  # of a row of `prompts`: ten words that are echoed


def prompts(first: int, count: int) -> Any:
    return text_column([f"w{n}" + " x" * 9 for n in range(first, first + count)])


def rows_of(store: Store, table: sa.Table, *where: Any) -> list[dict[str, Any]]:
    with store.read() as connection:
        return [dict(r) for r in connection.execute(sa.select(table).where(*where)).mappings()]


class Slow(EchoEngine):
    def complete(self, request: CompletionRequest) -> Completion:
        time.sleep(0.001)
        return super().complete(request)


def balanced(store: Store, limit: Decimal) -> dict[str, Any]:
    """The only budget: within its limit, nothing reserved, spent what the ledger says."""
    (row,) = rows_of(store, budgets)
    billed = sum(line["cost_nano"] for line in rows_of(store, ledger))
    assert row["spent_nano"] == billed <= row["limit_nano"] == nano(limit)
    assert row["reserved_nano"] == 0
    assert rows_of(store, reservations) == []
    return row


@pytest.mark.parametrize("rows", [37, 100, 400])
def test_workers_share_a_cap_and_spend_it(store_url: str, rows: int) -> None:
    """Each worker has a store of its own, as in a process of its own; the cap covers `rows` of 300."""
    limit = COST * rows + COST / 2
    answered: list[int] = []

    def work(number: int) -> None:
        store = Store(store_url)
        budget = SharedBudget(store, "local", [job_cap("j", nano(limit))])
        found = run(CALL, prompts(number * 100, 100), Tools(Slow(), store, budget), Asker(job=f"j/{number}"))
        assert set(found.summary.failed) <= {"budget_exceeded"}
        answered.append(100 - found.summary.failed.total())
        store.close()

    Store(store_url).close()
    workers = [threading.Thread(target=work, args=(n,)) for n in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    store = Store(store_url)
    left = nano(limit) - balanced(store, limit)["spent_nano"]
    worst = nano(amount(PRICES, Usage(4096, 0, 20)))
    assert left < 3 * worst or sum(answered) == 300  # one reservation for each engine slot
    assert sum(answered) <= min(rows, 300)
    store.close()


def test_a_cap_counts_what_was_spent_before_it_was_set(store_url: str) -> None:
    store = Store(store_url)
    run(CALL, prompts(0, 10), Tools(EchoEngine(), store), Asker(job="j/0"))
    run(CALL, prompts(10, 5), Tools(EchoEngine(), store), Asker(job="k/0"))
    SharedBudget(store, "local", [day_cap(nano(COST * 20)), job_cap("j", nano(COST * 11))])
    assert {r["name"][:3]: r["spent_nano"] for r in rows_of(store, budgets)} == {
        "day": nano(COST * 15),
        "job": nano(COST * 10),
    }
    run(CALL, prompts(20, 1), Tools(EchoEngine(), store), Asker())  # without a cap of its own: the day counts it
    SharedBudget(store, "local", [day_cap(nano(COST * 30))])
    assert {r["name"][:3]: (r["limit_nano"], r["spent_nano"]) for r in rows_of(store, budgets)} == {
        "day": (nano(COST * 30), nano(COST * 16)),
        "job": (nano(COST * 11), nano(COST * 10)),
    }
    store.close()


def test_a_tenants_budget_is_no_other_tenants(store_url: str) -> None:
    store = Store(store_url)
    for tenant in ("a", "b"):
        budget = SharedBudget(store, tenant, [day_cap(nano(COST * 8))])
        found = run(CALL, prompts(0, 5), Tools(EchoEngine(), store, budget), Asker(tenant))
        assert found.summary.computed in (0, 5)
    assert {r["tenant"] for r in rows_of(store, budgets)} == {"a", "b"}
    store.close()


MIDNIGHT = 1_798_761_600.0  # 2027-01-01T00:00:00Z


@dataclass
class Night:
    """A clock that stands at `at`."""

    at: float

    def now(self) -> float:
        return self.at

    def compare(self, connection: sa.Connection) -> None:
        pass

    def difference(self) -> None:
        return None


class OverMidnight(EchoEngine):
    """The clock moves to `times[n]` while the row n is computed."""

    def __init__(self, clock: Night, times: list[float]) -> None:
        super().__init__(64)
        self.clock, self.times = clock, times

    def complete(self, request: CompletionRequest) -> Completion:
        self.clock.at = self.times[min(len(self.requests), len(self.times) - 1)]
        return super().complete(request)


@given(
    start=st.integers(-7200, 100),
    steps=st.lists(st.integers(0, 3000), min_size=1, max_size=12),
    limit=st.integers(10, 40),
    rows=st.integers(1, 25),
)
@example(start=-10, steps=[1] * 12, limit=13, rows=12)
@example(start=-4000, steps=[500] * 12, limit=13, rows=12)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_each_days_budget_covers_what_was_paid_on_that_day(
    start: int,
    steps: list[int],
    limit: int,
    rows: int,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two runs of a tenant, the second after the first, as time goes on over midnight."""
    store = Store(tmp_path_factory.mktemp("n") / "s")
    times = list(accumulate(steps, initial=MIDNIGHT + start))
    clock = Night(times[0])
    store.database.clock = clock
    monkeypatch.setattr("complete_fn.execution.commits.SLICE_ROWS", 1)
    for number in (0, 1):
        budget = SharedBudget(store, "local", [day_cap(nano(COST * limit))])
        engine = OverMidnight(clock, times[number:])
        run(CALL, prompts(number * 100, rows), Tools(engine, store, budget), Asker())
    spent: Counter[str] = Counter()
    for line in rows_of(store, ledger):
        spent[day_budget(line["at"], "USD")] += line["cost_nano"]
    for row in rows_of(store, budgets):
        assert row["spent_nano"] == spent[row["name"]]
        assert row["reserved_nano"] == 0
    assert all(day <= nano(COST * limit) for day in spent.values())
    assert rows_of(store, reservations) == []
    store.close()


def test_the_row_before_midnight_is_paid_by_the_day_that_gets_it(store_url: str) -> None:
    store = Store(store_url)
    store.database.clock = clock = Night(MIDNIGHT - 20)
    budget = SharedBudget(store, "local", [day_cap(nano(COST * 12))])
    run(CALL, prompts(0, 1), Tools(OverMidnight(clock, [MIDNIGHT + 5]), store, budget), Asker())
    names = {r["name"]: r["spent_nano"] for r in rows_of(store, budgets)}
    assert names == {"day:2026-12-31:USD": 0, "day:2027-01-01:USD": nano(COST)}
    again = SharedBudget(store, "local", [day_cap(nano(COST * 12))])
    found = run(CALL, prompts(1, 1), Tools(EchoEngine(64), store, again), Asker())
    assert found.summary.failed == {"budget_exceeded": 1}
    store.close()


class Killed(BaseException):
    pass


class Mortal(Store):
    """The store of a process that is killed at its `left`-th write, before or after the commit."""

    left, after = 10**9, False

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        self.left -= 1
        if self.left < 0 or (self.left == 0 and not self.after):
            raise Killed
        with super().write() as connection:
            yield connection
        if self.left == 0:
            raise Killed


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(deaths=[(4, True), (6, False), (5, True)], rows=300, merge=True, capped=True)
@given(
    deaths=st.lists(st.tuples(st.integers(2, 12), st.booleans()), max_size=4),
    rows=st.integers(1, 300),
    merge=st.booleans(),
    capped=st.booleans(),
)
def test_billed_tokens_are_those_of_committed_rows_whatever_is_killed(
    deaths: list[tuple[int, bool]], rows: int, merge: bool, capped: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("s") / "s"
    limit, who = COST * 5000, Asker(job="j/0")
    call = CALL if merge else Call(MODEL, SamplingParams(max_tokens=20, temperature=1.0))

    def one_life(left: int, after: bool) -> Any:
        store = Mortal(path)
        store.left, store.after = left, after
        budget = SharedBudget(store, "local", [job_cap("j", nano(limit))]) if capped else None
        return run(call, prompts(0, rows), Tools(EchoEngine(), store, budget), who)

    Store(path).close()
    for left, after in deaths:
        with suppress(Killed):
            one_life(left, after)
        check = Store(path)
        with check.write() as connection:  # as another process that has this number now
            connection.execute(attempts.update().where(attempts.c.status == "running").values(pid_started=1.0))
        check.sweep()
        same_as_committed(check)
        if capped and rows_of(check, budgets):
            balanced(check, limit)
    found = one_life(10**9, False)
    assert found.text.to_pylist() == prompts(0, rows).to_pylist()
    check = Store(path)
    same_as_committed(check)
    inputs = rows_of(check, ledger, ledger.c.price_class == "input")
    assert len(rows_of(check, answers)) == rows == sum(x["rows"] for x in inputs)


def same_as_committed(store: Store) -> None:
    lines, kept = rows_of(store, ledger), rows_of(store, answers)
    billed = [x for x in lines if x["price_class"] in ("input", "cached_input", "output")]
    assert sum(x["tokens"] for x in billed) == sum(r["prompt_tokens"] + r["completion_tokens"] for r in kept)
    assert all(x["cost_nano"] == 0 for x in lines if x not in billed)


WORKER = """
import sys, time
from tests.integration.spending.test_shared_budget import *
store = Store(sys.argv[1])
number, limit = int(sys.argv[2]), int(sys.argv[3])
budget = SharedBudget(store, "local", [job_cap("j", limit)])
print("began", flush=True)
run(CALL, prompts(number * 1000, 1000), Tools(Slow(), store, budget), Asker(job=f"j/{number}"))
"""


@pytest.mark.long
def test_processes_killed_at_any_time_never_pass_the_cap(store_url: str) -> None:
    root = Path(__file__).parents[3]
    limit = COST * 1500
    store = Store(store_url)
    for round_ in range(3):
        command = [sys.executable, "-c", WORKER, store_url]
        started = [
            subprocess.Popen([*command, str(n), str(nano(limit))], stdout=subprocess.PIPE, cwd=root) for n in (0, 1)
        ]
        for each in started:
            assert each.stdout is not None
            assert each.stdout.readline() == b"began\n"
        time.sleep(0.2 + 0.3 * round_)
        for each in started:
            each.kill()
            each.communicate()
    finals = [
        subprocess.Popen([*command, str(n), str(nano(limit))], stdout=subprocess.DEVNULL, cwd=root) for n in (0, 1)
    ]
    assert [each.wait(120) for each in finals] == [0, 0]
    store.sweep()
    same_as_committed(store)
    left = nano(limit) - balanced(store, limit)["spent_nano"]
    assert left < 2 * nano(amount(PRICES, Usage(4096, 0, 20)))
    store.close()
