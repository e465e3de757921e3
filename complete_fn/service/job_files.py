"""A job has files in object storage: windows of its rows, its parts, and the results of its parts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from complete_fn.engines.catalogue import Model
from complete_fn.engines.tokenizer import token_sizes
from complete_fn.execution.answers import DETAILS, Answers
from complete_fn.interrupts import end_if_abandoned
from complete_fn.jobs.job import Job, Part
from complete_fn.ledger.usage import mean_output
from complete_fn.planning import BatchPlan, make_plan
from complete_fn.planning.parts import estimated_tokens
from complete_fn.planning.prefix_tree import SLACK, cut_tree, shared_beginnings
from complete_fn.prompts.options import parse_options
from complete_fn.rows.formats import LineRows, Rows, TableRows
from complete_fn.service.state import ServiceState

PART_TOKENS = 250_000  # tokens of a part's prompts and answers: about a minute of a small engine
PART_ROWS = 4_096
LIKELY_OUTPUT = 64  # tokens of an answer, for a model without answers in the ledger
WINDOWS = "windows.json"
LINES = pa.schema([("line", pa.large_binary())], {"complete_fn": "lines"})


@dataclass(frozen=True)
class PromptGroup:
    """Rows that are answered by one model with one set of options.

    Attributes:
        rows: [n] their numbers in the job.
        prompts: [n] large_string, as `run` takes them.
    """

    model: Model
    options: Mapping[str, Any]
    rows: Any
    prompts: Any


def write_parts(
    state: ServiceState, job: Job, first: int, groups: Sequence[PromptGroup]
) -> tuple[list[dict[str, Any]], int]:
    """Write parts numbered from `first` on; returns them as `JobStore.create` takes them, and their bytes."""
    pieces: list[dict[str, Any]] = []
    size = 0
    for group in groups:
        for rows, prompts, tokens, shared in cut(group, likely_output(state, job.tenant, group)):
            end_if_abandoned()
            with state.storage.writing(state.job_key(job.id, part_file(first + len(pieces)))) as sink:
                parquet.write_table(pa.table({"row": pa.array(rows), "prompt": prompts}), sink)
                size += sink.tell()
            pieces.append(
                {
                    "model": group.model.name,
                    "options": json.dumps(dict(group.options), sort_keys=True),
                    "rows": len(rows),
                    "tokens": tokens,
                    "shared": shared,
                }
            )
    return pieces, size


def write_window(state: ServiceState, job: str, number: int, rows: Rows) -> int:
    """Write a window's rows; returns their bytes in the storage."""
    table = pa.table([rows.lines], schema=LINES) if isinstance(rows, LineRows) else rows.table()
    with state.storage.writing(state.job_key(job, window_file(number))) as sink:
        parquet.write_table(table, sink)
        return sink.tell()


def write_windows(state: ServiceState, job: str, windows: Sequence[Mapping[str, Any]]) -> int:
    """Write the number of rows of each window, and the numbers of its parts; returns the bytes."""
    with state.storage.writing(state.job_key(job, WINDOWS)) as sink:
        return sink.write(json.dumps(windows).encode())


def window_file(number: int) -> str:
    return f"rows-{number:05}.parquet"


def part_file(number: int) -> str:
    return f"part-{number:05}.parquet"


def likely_output(state: ServiceState, tenant: str, group: PromptGroup) -> int:
    """Likely tokens of an answer: the mean of the model's past answers to the tenant, within the group's limit."""
    limit = parse_options(group.options).sampling.max_tokens or group.model.default_max_tokens
    return min(limit, round(mean_output(state.store, group.model.name, tenant) or LIKELY_OUTPUT))


def cut(group: PromptGroup, output: int) -> list[tuple[Any, Any, int, int]]:
    """(row numbers, prompts, estimated tokens, tokens shared with the part before) of each part.

    Equal prompts and shared prefixes stay together.
    """
    options = parse_options(group.options)
    plan = make_plan(group.prompts, mergeable=options.sampling.greedy, sizes=token_sizes(group.model))
    if not len(plan.order):
        return []
    tokens = estimated_tokens(plan) + output
    weights = np.maximum(tokens, PART_TOKENS // PART_ROWS)
    shared = shared_beginnings(plan)
    starts = cut_tree(shared, weights, int(PART_TOKENS / (1 + SLACK)))
    return [(*piece(group, plan, tokens, low, high), int(shared[low])) for low, high in pairwise(starts.tolist())]


def piece(group: PromptGroup, plan: BatchPlan, tokens: Any, low: int, high: int) -> tuple[Any, Any, int]:
    first, last = np.searchsorted(plan.distinct, [low, high])
    inside = plan.order[first:last]
    return np.asarray(group.rows)[inside], plan.gather.take(inside), int(tokens[low:high].sum())


RESULT = pa.schema([("row", pa.int64()), ("details", DETAILS)])


@dataclass(frozen=True)
class ResultWindow:
    """Neighbouring rows of a job: `rows` rows from row `first` on. The parts numbered `parts` answer them."""

    number: int
    first: int
    rows: int
    parts: Sequence[int]


def write_part(state: ServiceState, key: str, rows: Any, answers: Answers) -> tuple[int, int]:
    """Write a part's answers; returns the number of rows without an answer, and the bytes."""
    with state.storage.writing(key) as sink:
        parquet.write_table(pa.table([rows, answers.details], schema=RESULT), sink)
        return answers.summary.failed.total(), sink.tell()


def windows_of(state: ServiceState, job: Job) -> list[ResultWindow]:
    with state.storage.reading(state.job_key(job.id, WINDOWS)) as source:
        noted = json.loads(source.read())
    found, first = [], 0
    for number, window in enumerate(noted):
        found.append(ResultWindow(number, first, window["rows"], window["parts"]))
        first += window["rows"]
    return found


def rows_of(state: ServiceState, job: Job, window: ResultWindow) -> Rows:
    """The window's rows as they were submitted."""
    with state.storage.reading(state.job_key(job.id, window_file(window.number))) as source:
        table = parquet.read_table(source)
    if (table.schema.metadata or {}).get(b"complete_fn") == LINES.metadata[b"complete_fn"]:
        return LineRows(table.column("line").to_pylist())
    return TableRows(table)


def details_of(state: ServiceState, job: Job, window: ResultWindow, parts: Sequence[Part]) -> Any:
    """[rows] DETAILS in the window's row order; NULL where the prompt was NULL, or the row has not been done yet.

    If a row was run again, the answer of the later part counts.
    """
    done = [RESULT.empty_table()]
    for part in parts:
        if part.number in window.parts and part.result:
            end_if_abandoned()
            with state.storage.reading(state.job_key(job.id, part.result)) as source:
                done.append(parquet.read_table(source, schema=RESULT))
    joined = pa.concat_tables(done).combine_chunks()
    at = np.full(window.rows, -1, np.int64)
    at[joined.column("row").to_numpy() - window.first] = np.arange(joined.num_rows)
    return joined.column("details").take(pa.array(at, mask=at < 0)).combine_chunks()
