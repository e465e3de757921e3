"""A job's answers: result files of its parts, put back in the order of its rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import parquet

from complete_fn.answers import DETAILS, Answers
from complete_fn.errors import JobError
from complete_fn.files import Place, Rows, TableRows
from complete_fn.jobs import Job
from complete_fn.outputs import WRITERS
from complete_fn.service import Service
from complete_fn.submit import SOURCE
from complete_fn.uploads import read_table

RESULT = pa.schema([("row", pa.int64()), ("details", DETAILS)])
FORMATS = {
    "parquet": "application/vnd.apache.parquet",
    "jsonl": "application/x-ndjson",
    "arrow": "application/vnd.apache.arrow.stream",
    "csv": "text/csv",
}


def write_part(path: Path, rows: Any, answers: Answers) -> int:
    """Write a part's answers; returns how many rows have none."""
    details = answers.details
    beside = path.with_suffix(".writing")
    parquet.write_table(pa.table([rows, details], schema=RESULT), beside)
    beside.replace(path)
    return answers.summary.failed.total()


def details_of(service: Service, job: Job) -> Any:
    """[rows] DETAILS in the job's row order; NULL where the prompt was NULL, or the row has not been done yet."""
    folder = service.job_folder(job.id)
    done = [parquet.read_table(folder / p.result, schema=RESULT) for p in service.jobs.parts(job.id) if p.result]
    joined = pa.concat_tables([RESULT.empty_table(), *done]).combine_chunks()
    at = np.full(job.rows, -1, np.int64)
    at[joined.column("row").to_numpy()] = np.arange(joined.num_rows)
    return joined.column("details").take(pa.array(at, mask=at < 0)).combine_chunks()


def write_results(service: Service, job: Job, kind: str, with_details: bool, partial: bool, sink: Any) -> None:
    """The input's rows with the answers behind them, as `complete-fn run` writes them.

    Args:
        partial: only the rows that are done; else all rows of a job that is over.

    Raises:
        JobError: the job is not over, and `partial` is not set.
    """
    if not job.over and not partial:
        raise JobError(f"Job {job.id} is {job.status}. Wait, or ask with partial=true for the rows that are done.")
    request = json.loads(job.request)
    limits = service.limits
    source = service.job_folder(job.id) / SOURCE
    rows: Rows = read_table(source, request["file_name"], request["format"], limits.table_bytes, limits.job_rows)
    details = details_of(service, job)
    if partial:
        done = pc.indices_nonzero(pc.is_valid(details))
        rows, details = TableRows(rows.table().take(done)), details.take(done)
    failed = pc.is_valid(pc.struct_field(details, [1]))
    new = {request["column"]: pc.if_else(failed, None, pc.struct_field(details, [0]))}
    if with_details:
        new[f"{request['column']}_details"] = details
    WRITERS[kind](sink, Place("-", kind), rows, new)
