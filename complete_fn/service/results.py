"""A job's answers are read from the result files of its parts, in the order of the job's rows, window by window."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from complete_fn.errors import JobError
from complete_fn.interrupts import end_if_abandoned
from complete_fn.jobs.job import Job
from complete_fn.rows.formats import LineRows, Rows, TablePlace, TableRows, common_schema
from complete_fn.rows.writers import written_to
from complete_fn.service.job_files import details_of, rows_of, windows_of
from complete_fn.service.state import ServiceState


def result_windows(state: ServiceState, job: Job, with_details: bool, partial: bool) -> Iterator[tuple[Rows, Any, Any]]:
    """(rows, their new columns, their numbers) of each window.

    Args:
        partial: Give only the rows that are done. A completed job gives all rows, those without a prompt too.
    """
    column = json.loads(job.request)["column"]
    parts = state.jobs.parts(job.id)
    for window in windows_of(state, job):
        end_if_abandoned()
        rows, details = rows_of(state, job, window), details_of(state, job, window, parts)
        numbers = pa.array(np.arange(window.rows) + window.first)
        if partial and job.status != "completed":
            done = pc.indices_nonzero(pc.is_valid(details))
            rows, details, numbers = taken(rows, done), details.take(done), numbers.take(done)
        failed = pc.is_valid(pc.struct_field(details, [1]))
        new = {column: pc.if_else(failed, None, pc.struct_field(details, [0]))}
        if with_details:
            new[f"{column}_details"] = details
        yield rows, new, numbers


def taken(rows: Rows, numbers: Any) -> Rows:
    if isinstance(rows, LineRows):
        return LineRows([rows.lines[n] for n in numbers.to_pylist()])
    return TableRows(rows.table().take(numbers))


def write_results(
    state: ServiceState, job: Job, place: TablePlace, with_details: bool, partial: bool, sink: Any
) -> None:
    """Write the source's rows with their answers as last columns, as `complete-fn run` does.

    Args:
        partial: Write only the rows that are done; else all rows of a job that is over.

    Raises:
        JobError: The job is not over, and `partial` is not set.
    """
    if not job.over and not partial:
        raise JobError(f"Job {job.id} is {job.status}. Wait, or ask with partial=true for the rows that are done.")
    schema = None if place.format == "jsonl" else lines_schema(state, job)
    with written_to(sink, place, schema) as writer:
        for rows, new, _ in result_windows(state, job, with_details, partial):
            writer.write(rows, new)


def lines_schema(state: ServiceState, job: Job) -> Any:
    """The common columns of a JSONL source with several windows, each of which may lack some; None for others."""
    windows = windows_of(state, job)
    schema = None
    for window in windows if len(windows) > 1 else []:
        end_if_abandoned()
        rows = rows_of(state, job, window)
        if not isinstance(rows, LineRows):
            return None
        schema = common_schema(schema, rows.schema())
    return schema
