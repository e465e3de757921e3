"""`complete-fn run` takes an input of any size, window by window. It keeps each finished window, to resume from."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import parquet

from complete_fn.cli.run_input import Survey, prompt_digest
from complete_fn.engines.catalogue import Model
from complete_fn.errors import InputError
from complete_fn.execution.answers import Answers
from complete_fn.execution.rehearsal import rehearse
from complete_fn.execution.run_state import ASKED_AGAIN
from complete_fn.execution.summary import Summary
from complete_fn.interrupts import off_main
from complete_fn.progress import Progress, progress_for
from complete_fn.prompts.options import Options
from complete_fn.prompts.table_prompts import TablePrompts
from complete_fn.rows.databases import QuerySource, RowDatabase
from complete_fn.rows.formats import Rows
from complete_fn.rows.readers import Source
from complete_fn.rows.result_tables import KeysSeen, result_columns, result_names
from complete_fn.session import Session
from complete_fn.types import Usage

KEPT_DAYS = 30.0  # days that an unfinished run's windows are kept; its answers in the store are kept as long
DAY = 86_400.0


@dataclass
class WindowedRun:
    """One run: the prompt and options for each row, and the folder that keeps the finished windows."""

    session: RunSession
    model: str
    options: Options
    template: str
    job: str
    column: str
    details: bool
    summary: Summary = field(default_factory=Summary)
    begun: int = 1  # number of windows begun

    @property
    def folder(self) -> Path:
        return self.session.settings.home / "runs" / self.job

    @cached_property
    def made(self) -> TablePrompts:
        return TablePrompts(self.template, self.options.reorder_fields)

    def prompts(self, rows: Rows) -> Any:
        return self.made.of(rows)

    def jobs(self) -> list[str]:
        """The names of the windows begun so far, including those of earlier attempts."""
        return [self.window_job(number) for number in range(max(self.begun, *noted(self.folder), 1))]

    def window_job(self, number: int) -> str:
        """The name of a window in the store. The first window has the run's own name."""
        return self.job if number == 0 else hashlib.sha256(f"{self.job}/{number}".encode()).hexdigest()


class Target(Protocol):
    """A file's `Writer` or a table, which takes rows with their new columns."""

    def write(self, rows: Rows, new: Any) -> None: ...


@dataclass
class TableTarget:
    """A table of answers in a database."""

    database: RowDatabase
    table: str
    key: str
    column: str
    details: bool
    seen: KeysSeen = field(default_factory=KeysSeen)

    def refuse(self, rows: Rows) -> None:
        """Refuse rows whose answers cannot be written, before they are paid for.

        Raises:
            InputError: The key is no column of the rows, is a column of the answers, or does not identify rows; or the
                table exists and cannot take the answers; or the database refuses the rows.
        """
        if self.key not in rows.names:
            raise InputError(f"--key {self.key!r} is no column of the input. Columns: {', '.join(rows.names)}.")
        if self.key in result_names(self.column, self.details):
            raise InputError(f"--key {self.key!r} is a column of the answers too. Name those with --column NAME.")
        first, keys = not len(self.seen.seen), rows.column(self.key)
        self.seen.add(keys, self.key)
        if first and rows.count:
            rehearse(self.database, self.table, self.key, keys, self.column, self.details)

    def write(self, rows: Rows, new: Any) -> None:
        columns = {self.key: rows.column(self.key), **result_columns(self.column, new, self.details)}
        self.database.upsert(self.table, self.key, pa.table(columns))


def run_whole(work: WindowedRun, rows: Rows, target: Target) -> None:
    """Run an input of one window. All its prompts are one plan."""
    if isinstance(target, TableTarget):
        target.refuse(rows)
    answers = complete(work, rows, work.prompts(rows), 0)
    target.write(rows, new_columns(work, answers.text, answers.details if work.details else None))


def run_windows(work: WindowedRun, survey: Survey, target: Target) -> None:
    """Run an input of several windows. Each is planned by itself, and kept, so that a resumed run skips it."""
    forget_old(work.folder.parent)
    work.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    work.session.charge(work.model, work.jobs())
    mark = Mark(work.folder / "mark.json", survey.source, target, work.options.strict)
    work.summary = mark.passed + work.summary
    work.made.rows = mark.passed.rows
    for number, rows in enumerate(mark.windows(), mark.number):
        if isinstance(target, TableTarget):
            target.refuse(rows)
        prompts = work.prompts(rows)
        place = work.folder / f"window-{number:06}-{prompt_digest(prompts)}.parquet"
        details = parquet.read_table(place).column("details").combine_chunks() if place.exists() else None
        if details is not None and not asked_again(details, work.options.strict):
            work.summary = resumed(details) + work.summary
        else:
            details = complete(work, rows, prompts, number).details
            if not mark.kept:
                keep(place, details)
        target.write(rows, new_columns(work, text_of(details), details if work.details else None))
        mark.move(number + 1, rows, details)


class Mark:
    """Marks how far a run from a query into a table is, by the query's key. Rows before the mark are not read again.

    Other runs write all rows at their end, so they keep each window's answers instead.

    Attributes:
        kept: whether this run keeps a mark.
        number: windows before the mark.
        passed: the summary of their rows.
        begun: windows that were written, some perhaps behind the mark.
        held: whether a window has failed rows that must be asked again, so that the mark stays before it.
    """

    def __init__(self, path: Path, source: Source, target: Target, strict: bool) -> None:
        self.path, self.source, self.strict = path, source, strict
        self.kept = isinstance(source, QuerySource) and source.query.key is not None and isinstance(target, TableTarget)
        self.number = self.begun = 0
        self.after: int | str | None = None
        self.passed = Summary()
        self.held = False
        if self.kept and isinstance(target, TableTarget) and path.exists():
            self.read(target)

    def read(self, target: TableTarget) -> None:
        self.begun, *found = json.loads(self.path.read_text())
        if len(found) != 5:  # an older version wrote the mark, without the counts of passed rows
            return
        number, after, rows, nulls, failed = found
        # The table must still have the marked row: somebody may have dropped the table.
        there = after is not None and target.database.has(target.table, target.key, after)
        if there and not (failed and self.strict):
            self.number, self.after = number, after
            self.passed = Summary(rows, nulls, resumed=rows - nulls, failed=Counter(failed))

    def windows(self) -> Iterator[Rows]:
        if isinstance(self.source, QuerySource) and self.after is not None:
            return self.source.behind(self.after).windows()
        return self.source.windows()

    def move(self, number: int, rows: Rows, details: Any) -> None:
        if not self.kept or not isinstance(self.source, QuerySource) or not rows.count:
            return
        self.held = self.held or asked_again(details, self.strict)
        self.begun = max(self.begun, number)
        last = rows.column(str(self.source.query.key))[-1].as_py()
        if isinstance(last, int | str):
            if not self.held:
                self.number, self.after, self.passed = number, last, self.passed + resumed(details)
            counts = (self.passed.rows, self.passed.nulls, self.passed.failed)
            beside = self.path.with_suffix(".writing")
            beside.write_text(json.dumps([self.begun, self.number, self.after, *counts]))
            beside.replace(self.path)


def noted(folder: Path) -> list[int]:
    """Counts of begun windows by the files in the folder; the largest count is right."""
    kept = [int(path.name.split("-")[1]) + 2 for path in folder.glob("window-*.parquet")]  # +2: the next one was begun
    mark = folder / "mark.json"
    return [*kept, json.loads(mark.read_text())[0] + 1] if mark.exists() else kept


def keep(place: Path, details: Any) -> None:
    """Keep a window's answers. The file's name has a digest of the prompts, so that a changed input does not match."""
    beside = place.with_suffix(".writing")
    parquet.write_table(pa.table({"details": details}), beside)
    beside.replace(place)


def resumed(details: Any) -> Summary:
    """The summary of a window that an earlier attempt has finished."""
    codes = pc.struct_field(details, [1, 0]).drop_null().to_pylist()
    answered = len(details) - details.null_count
    return Summary(len(details), details.null_count, resumed=answered, failed=Counter(codes))


def asked_again(details: Any, strict: bool) -> bool:
    """Whether the window has failed rows that must be asked again. In a strict run, any failed row counts."""
    codes = pc.struct_field(details, [1, 0])
    return bool(pc.any(codes.is_valid() if strict else pc.is_in(codes, pa.array(ASKED_AGAIN))).as_py())


def forget_old(folder: Path) -> None:
    for left in folder.glob("*"):
        if left.stat().st_mtime < time.time() - KEPT_DAYS * DAY:
            shutil.rmtree(left, ignore_errors=True)


def end(work: WindowedRun) -> None:
    """End a run whose results are safe: delete the state that was kept for a resume."""
    for job in work.jobs():
        work.session.end_job(job)
    shutil.rmtree(work.folder, ignore_errors=True)


def complete(work: WindowedRun, rows: Rows, prompts: Any, number: int) -> Answers:
    work.begun = max(work.begun, number + 1)  # before the run: its committed rows count even if it fails
    answers = work.session.complete(work.model, prompts, work.options, work.window_job(number), planned=True)
    work.summary = work.summary + answers.summary if work.summary.rows else answers.summary
    return answers


def new_columns(work: WindowedRun, text: Any, details: Any) -> dict[str, Any]:
    found = {work.column: text}
    return found if details is None else {**found, f"{work.column}_details": details}


def text_of(details: Any) -> Any:
    return pc.if_else(pc.is_valid(pc.struct_field(details, [1])), None, pc.struct_field(details, [0]))


class OneBar:
    """One progress bar for all windows of a run. It grows with each window if the rows were not counted before."""

    def __init__(self, inner: Progress, rows: int | None) -> None:
        self.inner, self.rows, self.begun = inner, rows, False

    def start(self, rows: int) -> None:
        if self.rows is None:
            self.inner.start(rows)
        elif not self.begun:
            self.inner.start(self.rows)
        self.begun = True

    def advance(self, rows: int, usage: Usage, cost: Decimal, currency: str) -> None:
        self.inner.advance(rows, usage, cost, currency)

    def stop(self) -> None:
        """Do nothing at the end of a window: the bar goes on to the next one."""

    def close(self) -> None:
        self.inner.stop()


class RunSession(Session):
    """A session whose runs share one progress bar, after `share_bar`."""

    one: OneBar | None = None

    def bar(self, model: Model, rows: int) -> Progress:
        return super().bar(model, rows) if self.one is None else self.one

    @off_main
    def charge(self, model: str, jobs: list[str]) -> None:
        """Count the money that earlier attempts spent on all windows, before the first window begins again."""
        for job in jobs:
            self.caps_of(self.model(model), job)

    def share_bar(self, model: str, rows: int | None) -> None:
        self.one = OneBar(progress_for(model, self.progress), rows)

    def close(self) -> None:
        if self.one is not None:
            self.one.close()
        super().close()
