"""`submit_table` makes a job of a request: it writes the rows in windows, and the planned prompts in parts."""

from __future__ import annotations

import json
import secrets
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from complete_fn.engines.catalogue import Model
from complete_fn.engines.prices import nano
from complete_fn.errors import InvalidOptionError, NotFoundError, StoreError
from complete_fn.interrupts import end_if_abandoned
from complete_fn.jobs.api_keys import Principal
from complete_fn.jobs.job import Job
from complete_fn.prompts.options import parse_options
from complete_fn.prompts.schema_rules import refuse_patterns
from complete_fn.prompts.table_prompts import TablePrompts
from complete_fn.prompts.templates import refuse_missing, template_fields
from complete_fn.rows.databases import QuerySource
from complete_fn.rows.formats import LineRows, Rows
from complete_fn.rows.readers import FileSource, size_for_prompts
from complete_fn.rows.writers import refuse_clash
from complete_fn.service.job_files import PromptGroup, write_parts, write_window, write_windows
from complete_fn.service.sinks import SinkCheck, promise, withdraw
from complete_fn.service.sources import open_source
from complete_fn.service.state import ServiceState
from complete_fn.spending.budget import parse_cap, refuse_unpriced

RESULT_COLUMN = "completion"
SEVERAL_JOBS = "Shorten the template, or split the table into several jobs."


@dataclass(frozen=True, slots=True)
class TableSpec:
    """A job over a table. `source` as in `open_source`, `sink` as in `SinkCheck`, `options` as in `parse_options`.

    `column` names the answers in the results.
    """

    model: str
    prompt: str
    source: Mapping[str, Any]
    options: Mapping[str, Any]
    column: str = RESULT_COLUMN
    sink: Mapping[str, Any] | None = None
    max_cost: Any = None
    priority: int = 0
    idempotency_key: str | None = None
    query_tag: str | None = None


def submit_table(state: ServiceState, caller: Principal, spec: TableSpec) -> Job:
    """Make and queue a job over a table.

    Raises:
        RequestError: Model, options, template or source cannot be used, the prompts are too large, or the tenant's
            storage is full; nothing was kept.
        Abandoned: The caller has left; nothing was kept.
    """
    model = state.model(spec.model)
    if "strict" in spec.options:
        raise InvalidOptionError("'strict' is no option of a job: its results name the rows that failed.")
    if spec.max_cost is not None:
        refuse_unpriced(model)
    state.day_cap(caller.tenant, model)  # refuses a model whose money the tenant's budget cannot count
    options = parse_options(spec.options)
    refuse_patterns(options.response_format)
    fields = template_fields(spec.prompt)
    if not fields:
        raise InvalidOptionError("The prompt names no {column}: every row would be asked the same.")
    made = TablePrompts(spec.prompt, options.reorder_fields, state.limits.job_prompt_bytes, SEVERAL_JOBS)
    source = source_for(open_source(state, caller.tenant, spec.source), made)
    sink = None if spec.sink is None else SinkCheck(state, caller.tenant, spec.sink, spec.column)
    request = {
        "model": spec.model,
        "prompt": spec.prompt,
        "source": dict(spec.source),
        "options": dict(spec.options),
        "column": spec.column,
        "sink": None if spec.sink is None else dict(spec.sink),
        "max_cost": None if spec.max_cost is None else str(spec.max_cost),
    }
    if isinstance(source, FileSource) and made.may_exceed(state.limits.job_rows, state.limits.table_bytes):
        refuse_too_many(source, made)
    job = new_job(state, caller, "table", model, 0, request, spec)
    with drafted(state, job) as draft:
        names: set[str] = set()
        for rows in source.windows():
            names.update(rows.names)
            refuse_clash(rows.names, spec.column, with_details=True, option="'column'")
            end_if_abandoned()
            if sink is not None:
                sink.refuse(rows)
            prompts = window_prompts(made, rows)
            numbers = np.arange(rows.count) + draft.rows
            draft.add_window(rows.count, [PromptGroup(model, spec.options, numbers, prompts)], rows)
        refuse_missing(fields, sorted(names))
        if sink is not None:
            sink.refuse_table()
        end_if_abandoned()
        return draft.keep()


def source_for(source: FileSource | QuerySource, prompts: TablePrompts) -> FileSource | QuerySource:
    """The source, in windows whose prompts fit into memory."""
    return replace(source, window=size_for_prompts(prompts.own_bytes, prompts.most_mentions))


def refuse_too_many(source: FileSource, made: TablePrompts) -> None:
    """Count a file's prompts in a pass of its own, as it takes long to make and plan as many as a job may have.

    Raises:
        InputError: See `window_prompts`.
    """
    counted = replace(made)
    for rows in source.windows():
        refuse_absent(counted, rows)
        counted.count_bytes(rows.count, rows.columns(counted.mentions))


def window_prompts(made: TablePrompts, rows: Rows) -> pa.ChunkedArray:
    """The prompts of a window's rows.

    Raises:
        InputError: The template names a column that the rows lack. A JSONL file may have it in another window.
        TooLargeError: See `TablePrompts.of`.
    """
    refuse_absent(made, rows)
    return made.of(rows)


def refuse_absent(made: TablePrompts, rows: Rows) -> None:
    if not isinstance(rows, LineRows):
        refuse_missing(made.mentions, rows.names)


def new_job(
    state: ServiceState,
    caller: Principal,
    kind: str,
    model: Model,
    rows: int,
    request: Mapping[str, Any],
    spec: TableSpec | None = None,
    deadline: float | None = None,
) -> Job:
    return Job(
        id=f"{'job' if kind == 'table' else 'batch'}_{secrets.token_hex(12)}",
        tenant=caller.tenant,
        user=caller.user,
        kind=kind,
        status="queued",
        ends_as=None,
        model=model.name,
        rows=rows,
        nulls=0,
        max_cost_nano=None if spec is None or spec.max_cost is None else nano(parse_cap(spec.max_cost)),
        currency=model.prices.currency,
        basis=model.prices.basis,
        priority=spec.priority if spec else 0,
        idempotency_key=spec.idempotency_key if spec else None,
        request=json.dumps(request, sort_keys=True),
        query_tag=spec.query_tag if spec else None,
        created_at=state.store.now(),
        started_at=None,
        ended_at=None,
        deadline=deadline,
        error=None,
    )


@contextmanager
def drafted(state: ServiceState, job: Job) -> Iterator[Draft]:
    """A job that is being written. If the store gets no record of the job, its files are deleted again."""
    draft = Draft(state, job)
    try:
        yield draft
    finally:
        if not draft.kept and not recorded(state, job):
            state.storage.delete_folder(state.job_key(job.id))


def recorded(state: ServiceState, job: Job) -> bool:
    """Whether the store has the job, as a commit may succeed although its reply is lost. True if the store is away."""
    try:
        state.jobs.get(job.tenant, job.id)
    except NotFoundError:
        return False
    except StoreError:
        return True
    return True


class Draft:
    """A job and its files, before the store has a record of the job."""

    def __init__(self, state: ServiceState, job: Job) -> None:
        self.state, self.job = state, job
        self.rows = self.bytes = 0
        self.windows: list[dict[str, Any]] = []
        self.pieces: list[dict[str, Any]] = []
        self.kept = False

    def add_window(self, count: int, groups: Sequence[PromptGroup], rows: Rows | None = None) -> None:
        """Add the next `count` rows, as groups to answer. `rows`, if given, are kept for the results.

        Raises:
            StorageFullError: The job has more bytes than its tenant may keep.
        """
        if rows is not None:
            self.bytes += write_window(self.state, self.job.id, len(self.windows), rows)
        first = len(self.pieces)
        pieces, size = write_parts(self.state, self.job, first, groups)
        self.pieces += pieces
        self.bytes += size
        self.state.quota.refuse(self.job.tenant, self.bytes)
        self.windows.append({"rows": count, "parts": list(range(first, len(self.pieces)))})
        self.rows += count

    def keep(self) -> Job:
        """Record the job. If its idempotency key is known, return the job that has the key."""
        self.bytes += write_windows(self.state, self.job.id, self.windows)
        nulls = self.rows - sum(p["rows"] for p in self.pieces)
        if json.loads(self.job.request).get("sink"):
            with self.state.store.write() as connection:
                promise(connection, self.job)  # before the job's record: a delivery without a job does no harm
        whole = replace(self.job, rows=self.rows, nulls=nulls, bytes=self.bytes)
        kept = self.state.jobs.create(whole, self.pieces)
        self.kept = kept.id == self.job.id
        if not self.kept:
            withdraw(self.state, self.job.id)
        self.state.queue.announce(Counter(p["model"] for p in self.pieces))
        return kept
