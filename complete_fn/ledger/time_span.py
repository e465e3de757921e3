"""The sums of a time span come from the rollup for whole hours, and from the ledger's lines for parts of hours."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import UTC, datetime

import sqlalchemy as sa

from complete_fn.errors import InvalidOptionError
from complete_fn.store.rollup import GROUPED, HOUR, SUMMED, hour_of
from complete_fn.store.tables import ledger, ledger_hours, upkeep

LINES_FROM = "ledger lines"  # the row of `upkeep` whose time is that from which on no line was deleted
DELETED = (
    "{at} is within an hour (UTC) of which only the sums are kept: single lines are kept from {kept} on "
    "(COMPLETE_FN_LEDGER_DAYS). Take a whole hour, such as {hour}."
)


@dataclass(frozen=True, slots=True)
class TimeSpan:
    """From `since` on and before `until`, in seconds of the epoch. `until` None: without an end."""

    since: float = 0.0
    until: float | None = None

    @property
    def hours(self) -> tuple[int, int | None]:
        """The first whole hour, and the first hour behind the whole hours."""
        return math.ceil(self.since / HOUR) * HOUR, None if self.until is None else hour_of(self.until)

    @property
    def rests(self) -> list[tuple[float, float]]:
        """The parts of hours at either end, as (since, until)."""
        first, last = self.hours
        if last is None or self.until is None:
            found = [(self.since, float(first))]
        elif first > last:
            found = [(self.since, self.until)]
        else:
            found = [(self.since, float(first)), (float(last), self.until)]
        return [(since, until) for since, until in found if since < until]

    def lines(self, tenant: str | None = None) -> sa.Subquery:
        """The ledger in this span, of one tenant or of all, with the columns `at`, GROUPED and SUMMED.

        A whole hour's lines are rows of the rollup, with the hour's first second as `at`.
        """
        first, last = self.hours
        hour, at = ledger_hours.c.hour, ledger.c.at
        whole = (hour >= first) if last is None else (hour >= first) & (hour < last)
        selects = [sa.select(sa.cast(hour, sa.Float).label("at"), *columns_of(ledger_hours)).where(whole)]
        for since, until in self.rests:
            selects.append(sa.select(at, *columns_of(ledger)).where(at >= since, at < until))
        if tenant is not None:
            tables = [ledger_hours, *[ledger] * len(self.rests)]
            selects = [s.where(table.c.tenant == tenant) for s, table in zip(selects, tables, strict=True)]
        return (sa.union_all(*selects) if len(selects) > 1 else selects[0]).subquery("span")

    def refuse_deleted(self, connection: sa.Connection) -> None:
        """Refuse a span that needs deleted lines. Call it after the sums were read, as lines are deleted meanwhile.

        Raises:
            InvalidOptionError: An end of the span is within an hour whose lines are deleted.
        """
        kept = lines_from(connection)
        for since, _ in self.rests:
            if hour_of(since) < kept:
                at = since if since % HOUR else self.until or since
                raise InvalidOptionError(DELETED.format(at=iso(at), kept=iso(kept), hour=iso(hour_of(at))))


def columns_of(table: sa.Table) -> list[sa.Column[object]]:
    return [table.c[name] for name in (*GROUPED, *SUMMED)]


def lines_from(connection: sa.Connection) -> float:
    """The time from which on no line of the ledger was deleted."""
    return float(connection.execute(sa.select(upkeep.c.at).where(upkeep.c.name == LINES_FROM)).scalar() or 0.0)


def iso(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
