"""From a request to a job: prompts in execution order, cut into parts, each a Parquet file in the job's folder."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from complete_fn.budget import parse_cap
from complete_fn.catalogue import Model
from complete_fn.errors import InputError, InvalidOptionError
from complete_fn.files import Rows
from complete_fn.jobs import Job
from complete_fn.key_store import Principal
from complete_fn.options import parse_options
from complete_fn.plan import BatchPlan, make_plan
from complete_fn.plan.parts import estimated_tokens
from complete_fn.prices import nano
from complete_fn.prompts import render_column, template_fields
from complete_fn.reports import mean_output
from complete_fn.schema_bounds import refuse_patterns
from complete_fn.service import Service
from complete_fn.uploads import read_table

PART_TOKENS = 250_000  # prompts and answers: about a minute of a small engine
PART_ROWS = 4_096
LIKELY_OUTPUT = 64  # tokens of an answer of a model that has none in the ledger
SOURCE = "source"
RESULT_COLUMN = "completion"


@dataclass(frozen=True, slots=True)
class TableSpec:
    """A job over an uploaded table. `options` as in `parse_options`; `column` names the answers in the results."""

    model: str
    prompt: str
    file_id: str
    options: Mapping[str, Any]
    column: str = RESULT_COLUMN
    max_cost: Any = None
    priority: int = 0
    idempotency_key: str | None = None
    query_tag: str | None = None


@dataclass(frozen=True)
class Group:
    """Rows that are answered by one model with one set of options.

    Attributes:
        rows: [n] their numbers in the job.
        prompts: [n] large_string, as `run` takes them.
    """

    model: Model
    options: Mapping[str, Any]
    rows: Any
    prompts: Any


def submit_table(service: Service, caller: Principal, spec: TableSpec) -> Job:
    """Raises:
    RequestError: model, options, template or file cannot be used; nothing was kept.
    """
    model = service.model(spec.model)
    if "strict" in spec.options:
        raise InvalidOptionError("'strict' is no option of a job: its results name the rows that failed.")
    refuse_patterns(parse_options(spec.options).response_format)
    upload = service.uploads.get(caller.tenant, spec.file_id)
    limits = service.limits
    source = service.uploads.path(upload)
    table = read_table(source, upload.name, upload.format, limits.table_bytes, limits.job_rows)
    if not template_fields(spec.prompt):
        raise InvalidOptionError("The prompt names no {column}: every row would be asked the same.")
    if spec.column in table.names or f"{spec.column}_details" in table.names:
        raise InputError(f"The file already has a column {spec.column!r}. Name the new one with 'column'.")
    prompts = render_column(spec.prompt, needed_columns(table, spec.prompt), table.count)
    group = Group(model, spec.options, np.arange(table.count), prompts)
    request = {
        "model": spec.model,
        "prompt": spec.prompt,
        "file_id": spec.file_id,
        "file_name": upload.name,
        "format": upload.format,
        "options": dict(spec.options),
        "column": spec.column,
        "max_cost": None if spec.max_cost is None else str(spec.max_cost),
    }
    job = new_job(caller, "table", model, table.count, request, spec)
    return keep(service, job, [group], source)


def needed_columns(table: Rows, template: str) -> dict[str, Any]:
    fields = template_fields(template)
    if missing := [name for name in fields if name not in table.names]:
        raise InputError(f"The prompt names {{{missing[0]}}}, which is no column. Columns: {', '.join(table.names)}.")
    return {name: table.column(name) for name in fields}


def new_job(
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
        created_at=time.time(),
        started_at=None,
        ended_at=None,
        deadline=deadline,
        error=None,
    )


def keep(service: Service, job: Job, groups: Sequence[Group], source: Path) -> Job:
    """Write the job's folder, then the job; a job known by its idempotency key is returned as it is."""
    folder = service.job_folder(job.id)
    folder.mkdir(parents=True, mode=0o700)
    kept = None
    try:
        link(source, folder / SOURCE)
        pieces: list[dict[str, Any]] = []
        for group in groups:
            for rows, prompts, tokens in cut(group, likely_output(service, group)):
                table = pa.table({"row": pa.array(rows), "prompt": prompts})
                parquet.write_table(table, folder / part_file(len(pieces)))
                pieces.append(
                    {
                        "model": group.model.name,
                        "options": json.dumps(dict(group.options), sort_keys=True),
                        "rows": len(rows),
                        "tokens": tokens,
                    }
                )
        nulls = job.rows - sum(p["rows"] for p in pieces)
        kept = service.jobs.create(replace(job, nulls=nulls), pieces)
    finally:
        if kept is None or kept.id != job.id:
            shutil.rmtree(folder, ignore_errors=True)
    service.queue.notify()
    return kept


def link(source: Path, target: Path) -> None:
    """The job keeps its input also when the upload is deleted; without a second copy where the disk allows it."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def part_file(number: int) -> str:
    return f"part-{number:05}.parquet"


def likely_output(service: Service, group: Group) -> int:
    """Tokens of an answer, from the model's past rows."""
    limit = parse_options(group.options).sampling.max_tokens or group.model.default_max_tokens
    return min(limit, round(mean_output(service.store, group.model.name) or LIKELY_OUTPUT))


def cut(group: Group, output: int) -> list[tuple[Any, Any, int]]:
    """(row numbers, prompts, estimated tokens) of each part; equal prompts and shared prefixes stay together."""
    options = parse_options(group.options)
    plan = make_plan(group.prompts, mergeable=options.sampling.greedy)
    if not len(plan.order):
        return []
    tokens = estimated_tokens(plan) + output
    number = np.cumsum(np.maximum(tokens, PART_TOKENS // PART_ROWS)) // PART_TOKENS
    starts = np.append(np.flatnonzero(np.diff(number, prepend=-1)), len(number))
    return [piece(group, plan, tokens, low, high) for low, high in pairwise(starts.tolist())]


def piece(group: Group, plan: BatchPlan, tokens: Any, low: int, high: int) -> tuple[Any, Any, int]:
    first, last = np.searchsorted(plan.distinct, [low, high])
    inside = plan.order[first:last]
    return np.asarray(group.rows)[inside], plan.gather.take(inside), int(tokens[low:high].sum())
