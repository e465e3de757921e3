"""Which jobs and files a list shows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import sqlalchemy as sa

from complete_fn.store.job_tables import files, jobs

Condition = sa.ColumnElement[bool]


@dataclass(frozen=True, slots=True)
class JobFilter:
    """Jobs of any of the statuses, made from `created_after` on and before `created_before`. None is no condition."""

    statuses: Sequence[str] = ()
    model: str | None = None
    query_tag: str | None = None
    created_after: float | None = None
    created_before: float | None = None

    def conditions(self) -> Iterator[Condition]:
        if self.statuses:
            yield jobs.c.status.in_(self.statuses)
        yield from same((jobs.c.model, self.model), (jobs.c.query_tag, self.query_tag))
        yield from created_within(jobs, self.created_after, self.created_before)


@dataclass(frozen=True, slots=True)
class FileFilter:
    """Files made from `created_after` on and before `created_before`. None is no condition."""

    purpose: str | None = None
    created_after: float | None = None
    created_before: float | None = None

    def conditions(self) -> Iterator[Condition]:
        yield from same((files.c.purpose, self.purpose))
        yield from created_within(files, self.created_after, self.created_before)


EVERY_JOB, EVERY_FILE = JobFilter(), FileFilter()


def same(*wanted: tuple[sa.Column[str], str | None]) -> Iterator[Condition]:
    for column, value in wanted:
        if value is not None:
            yield column == value


def created_within(table: sa.Table, after: float | None, before: float | None) -> Iterator[Condition]:
    if after is not None:
        yield table.c.created_at >= after
    if before is not None:
        yield table.c.created_at < before
