"""The rollup by hour has exactly the sums of the ledger's lines, and keeps them when the lines are deleted."""

from __future__ import annotations

import itertools
import random
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest
import sqlalchemy as sa
from alembic import command
from hypothesis import given, settings
from hypothesis import strategies as st

from complete_fn.errors import InvalidOptionError
from complete_fn.ledger import pruning
from complete_fn.ledger.focus_export import charges
from complete_fn.ledger.pruning import DAY, prune_ledger
from complete_fn.ledger.usage import GROUPS, Totals, UsageLine, mean_output, usage
from complete_fn.settings import load_settings
from complete_fn.store.attempts import Attempt
from complete_fn.store.records import LedgerLine
from complete_fn.store.rollup import HOUR
from complete_fn.store.schema import configuration
from complete_fn.store.store import Store
from complete_fn.store.tables import ledger, ledger_hours, metadata
from complete_fn.types import Asker

FIRST = 1_767_222_000  # 2025-12-31T23:00Z: the spans of the tests cross a day, a month and a year
CLASSES = ("input", "cached_input", "output", "duplicate", "reused", "prefix_cache", "swiftkv", "lost", "resumed")
NAMES = iter(itertools.count())


@dataclass(frozen=True)
class Written:
    """A line of the ledger as a test writes it."""

    at: float
    user: str
    job: str | None
    tag: str | None
    model: str
    currency: str
    line: LedgerLine


times = st.one_of(
    st.floats(FIRST, FIRST + 4 * HOUR, allow_nan=False),
    st.integers(0, 4).map(lambda n: float(FIRST + n * HOUR)),
    st.integers(1, 4).map(lambda n: FIRST + n * HOUR - 2.0**-20),
)
amounts = st.integers(0, 2**53)
lines = st.builds(
    LedgerLine,
    st.sampled_from(CLASSES),
    *[amounts] * 6,
    st.sampled_from([None, "host/1", "host/2"]),
)
written = st.builds(
    Written,
    times,
    st.sampled_from(["ann", "bob"]),
    st.sampled_from([None, "", "-", "job_1"]),
    st.sampled_from([None, "", "a\x00tag"]),
    st.sampled_from(["m", "n"]),
    st.sampled_from(["USD", "EUR"]),
    lines,
)
ends = st.one_of(st.none(), times)


@pytest.fixture
def store(store_url: str) -> Iterator[Store]:
    opened = Store(store_url)
    yield opened
    opened.close()


def write(store: Store, tenant: str, *many: Written) -> None:
    with store.write() as connection:
        for w in many:
            attempt = Attempt(1, tenant, w.user, w.model, w.job, w.tag, w.currency, "list")
            store.write_lines(connection, attempt, [w.line], w.at)


def simple(at: float, rows: int = 1, price_class: str = "input", **more: Any) -> Written:
    return Written(at, "ann", "job_1", None, "m", "USD", LedgerLine(price_class, rows, 10 * rows, 7 * rows, **more))


def group_of(name: str, w: Written, tenant: str) -> str:
    at = datetime.fromtimestamp(w.at // HOUR * HOUR, UTC)
    values = {
        "hour": f"{at:%Y-%m-%dT%H:00Z}",
        "day": f"{at:%Y-%m-%d}",
        "model": w.model,
        "query_tag": w.tag,
        "job": w.job,
        "user": w.user,
        "tenant": tenant,
        "engine": w.line.engine,
    }
    return values[name] or ("" if values[name] == "" else "-")


def counted(many: Sequence[Written], by: Sequence[str], tenant: str) -> Counter[UsageLine]:
    """What `usage` must answer: the lines themselves, added up."""
    groups: dict[tuple[Any, ...], list[LedgerLine]] = {}
    for w in many:
        # A missing job and the job "-" have the same name in a report, and are two groups.
        exact = tuple({"job": w.job, "query_tag": w.tag, "engine": w.line.engine}.get(name, "") for name in by)
        group = tuple(group_of(name, w, tenant) for name in by)
        groups.setdefault((group, exact, w.currency), []).append(w.line)
    return Counter(usage_line(group, found, currency) for (group, _, currency), found in groups.items())


def usage_line(group: tuple[str, ...], found: Sequence[LedgerLine], currency: str) -> UsageLine:
    def total(name: str, *classes: str) -> int:
        return sum(getattr(line, name) for line in found if line.price_class in classes)

    def cash(nano: int) -> Decimal:
        return Decimal(nano).scaleb(-9)

    free = ("duplicate", "reused")
    return UsageLine(
        group,
        total("rows", "input", *free),
        total("tokens", "input", "cached_input"),
        total("tokens", "cached_input"),
        total("tokens", "output"),
        cash(total("cost_nano", *CLASSES)),
        cash(total("saved_nano", *free)),
        currency,
        "list",
        total("rows", "lost"),
        total("tokens", "lost"),
        cash(total("saved_nano", "prefix_cache")),
        total("device_us", "input") / 1e6,
        0.0,
        0.0,
        total("saved_us", *free, "prefix_cache", "swiftkv") / 1e6,
    )


def within(many: Sequence[Written], since: float | None, until: float | None) -> list[Written]:
    return [w for w in many if w.at >= (since or 0.0) and (until is None or w.at < until)]


def test_usage_of_any_span_is_exactly_the_sum_of_its_lines(store: Store) -> None:
    @settings(max_examples=60, deadline=None)
    @given(st.lists(written, max_size=12), ends, ends, st.sets(st.sampled_from([*GROUPS])).map(sorted))
    def check(many: list[Written], since: float | None, until: float | None, by: list[str]) -> None:
        tenant = f"tenant{next(NAMES)}"
        write(store, tenant, *many)
        found = usage(store, by, since or 0.0, tenant, until)
        assert Counter(found) == counted(within(many, since, until), by, tenant)

    check()


def test_the_rollup_answers_whole_hours_without_the_lines(store: Store) -> None:
    write(store, "acme", *(simple(FIRST + n * 600.0) for n in range(24)))
    with store.write() as connection:
        assert connection.execute(sa.select(sa.func.count()).select_from(ledger_hours)).scalar() == 4
        connection.execute(ledger.delete())
    assert [line.rows for line in usage(store, ["hour"], FIRST + HOUR, until=FIRST + 3 * HOUR)] == [6, 6]
    assert usage(store, ["day"])[0].group == ("2025-12-31",)
    assert usage(store, ["hour"], FIRST + HOUR)[0].group == ("2026-01-01T00:00Z",)
    assert sum(row["x_Rows"] for row in charges(store).to_pylist()) == 24


def test_lines_with_one_key_in_one_slice_are_added(store: Store) -> None:
    attempt = store.begin(Asker("acme"), "m", "USD", "list")
    for _ in range(2):
        store.commit(attempt, [], [LedgerLine("input", 1, 5, 7), LedgerLine("input", 2, 6, 8)], 0, 0)
    with store.read() as connection:
        row = connection.execute(sa.select(ledger_hours)).mappings().one()
    assert (row["rows"], row["tokens"], row["cost_nano"]) == (6, 22, 30)


def test_eight_committers_never_deadlock_and_their_sums_are_exact(postgres_url: str) -> None:
    store, errors = Store(postgres_url), []
    sa.event.listen(store.engine, "handle_error", lambda context: errors.append(context.original_exception))
    engines = [f"host/{n}" for n in range(6)]
    start = threading.Barrier(8)

    def committer(number: int) -> int:
        draw = random.Random(number)
        attempt = store.begin(Asker("acme", "ann", "job_1/0"), "m", "USD", "list")
        start.wait()
        for _ in range(40):
            slice_lines = [LedgerLine(c, 1, 3, 5, engine=e) for c in CLASSES[:4] for e in engines]
            draw.shuffle(slice_lines)
            store.commit(attempt, [], slice_lines, 0, 0)
        store.admit(attempt, 2, 20)
        store.finish(attempt, "cancelled")
        return 40 * len(slice_lines)

    with ThreadPoolExecutor(8) as pool:
        committed = sum(pool.map(committer, range(8)))
    assert errors == []
    (line,) = usage(store, ["job"])
    assert line.cost == Decimal(5 * committed).scaleb(-9)
    assert (line.lost_rows, line.lost_tokens) == (16, 160)
    with store.read() as connection:
        of_lines = connection.execute(sa.select(sa.func.sum(ledger.c.tokens))).scalar()
        by_hour = connection.execute(sa.select(sa.func.sum(ledger_hours.c.tokens))).scalar()
    assert of_lines == by_hour == 3 * committed + 160
    store.close()


def test_the_totals_count_every_line_also_one_that_is_dated_back(store: Store) -> None:
    totals, now = Totals(store), FIRST + 5 * HOUR + 3.0
    assert not totals.ledger().rows
    seen = 0
    for at in (now, now - 8.0, now - 0.5 * HOUR, now + 60.0, now + 2 * HOUR, now + 2 * HOUR - 8.0):
        write(store, "acme", simple(at))
        seen += 1
        assert totals.ledger().rows["m", "input"] == seen
    write(store, "acme", simple(FIRST))  # many hours late
    write(store, "acme", simple(now + 3 * HOUR))
    found = totals.ledger()
    assert found.rows["m", "input"] == seen + 2
    assert found.nano["m", "USD", "list"] == 7 * (seen + 2)
    assert Totals(store).ledger() == found


def test_a_store_from_before_the_rollup_gets_it_from_its_lines(store: Store, store_url: str) -> None:
    attempt = Attempt(0, "-", "-", "m", None, None, "USD", "list")
    write(store, "acme", *(simple(FIRST + n * 1000.0, n, engine="host/1") for n in range(20)))
    write(store, "bolt", *(simple(FIRST + n * 5000.0, n, "output") for n in range(20)))
    with store.write() as connection:
        store.write_lines(connection, attempt, [LedgerLine("idle", 0, 0, device_us=9, engine="host/1")], FIRST + 10.0)
    before, hours = usage(store, [*GROUPS]), rows_by_key(store)
    assert hours
    with store.write() as connection:
        columns = [column for column in ledger.c if column is not ledger.c.id]
        lines = [dict(row) for row in connection.execute(sa.select(*columns)).mappings()]
        metadata.drop_all(connection)
        connection.execute(sa.text("DROP TABLE alembic_version"))
        command.upgrade(configuration(connection), "0002")
        connection.execute(ledger.insert(), lines)
    again = Store(store_url)
    assert rows_by_key(again) == hours
    assert usage(again, [*GROUPS]) == before
    write(again, "acme", simple(FIRST, engine="host/1"))  # new lines are added to the same rows
    assert rows_by_key(again).keys() == hours.keys()
    again.close()


def rows_by_key(store: Store) -> dict[bytes, dict[str, Any]]:
    with store.read() as connection:
        return {row["key"]: dict(row) for row in connection.execute(sa.select(ledger_hours)).mappings()}


def test_old_lines_are_deleted_and_the_sums_stay(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pruning, "CHUNK", 10)
    monkeypatch.setattr(pruning, "LINES_AT_ONCE", 25)
    many = [simple(FIRST + n * 360.0, n + 1, price_class) for n in range(40) for price_class in ("input", "output")]
    write(store, "acme", *many)
    before, charged, totals = usage(store, [*GROUPS]), charges(store), Totals(store).ledger()
    now = FIRST + 2.5 * HOUR + 30 * DAY
    assert prune_ledger(store, 30, now) == 30  # in chunks, and no more than so many at once
    while prune_ledger(store, 30, now):
        pass
    with store.read() as connection:
        left = connection.execute(sa.select(sa.func.count(), sa.func.min(ledger.c.at))).one()
    assert tuple(left) == (40, FIRST + 2 * HOUR)  # whole hours only
    assert usage(store, [*GROUPS]) == before
    assert charges(store).equals(charged)
    assert Totals(store).ledger() == totals
    assert mean_output(store, "m", "acme") == 10
    assert counted(within(many, FIRST + HOUR, FIRST + 2.5 * HOUR), ["hour"], "acme") == Counter(
        usage(store, ["hour"], FIRST + HOUR, "acme", FIRST + 2.5 * HOUR)
    )


def test_a_part_of_an_hour_whose_lines_are_deleted_is_refused(store: Store) -> None:
    write(store, "acme", *(simple(FIRST + n * 360.0) for n in range(40)))
    prune_ledger(store, 30, FIRST + 2.5 * HOUR + 30 * DAY)
    prune_ledger(store, 40, FIRST + 2.5 * HOUR + 30 * DAY)  # a longer time brings no line back
    told = (
        r"2026-01-01T00:10:00Z is within an hour \(UTC\) of which only the sums are kept: single lines are kept from "
        r"2026-01-01T01:00:00Z on \(COMPLETE_FN_LEDGER_DAYS\)\. Take a whole hour, such as 2026-01-01T00:00:00Z\."
    )
    with pytest.raises(InvalidOptionError, match=told):
        usage(store, ["day"], FIRST + HOUR + 600.0)
    with pytest.raises(InvalidOptionError, match=told):
        usage(store, ["day"], FIRST, until=FIRST + HOUR + 600.0)
    with pytest.raises(InvalidOptionError, match=told):
        charges(store, FIRST + HOUR + 600.0)
    assert usage(store, ["day"], FIRST, until=FIRST + 2 * HOUR)
    assert usage(store, ["day"], FIRST, until=FIRST + 2 * HOUR + 600.0)


def test_lines_are_kept_for_at_least_a_month(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_settings().ledger_days is None
    monkeypatch.setenv("COMPLETE_FN_LEDGER_DAYS", "365")
    assert load_settings().ledger_days == 365
    monkeypatch.setenv("COMPLETE_FN_LEDGER_DAYS", "7")
    with pytest.raises(InvalidOptionError, match=r"COMPLETE_FN_LEDGER_DAYS='7' .* must be at least 30\."):
        load_settings()
