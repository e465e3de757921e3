"""A job has files in object storage: windows of its rows, its parts, and the results of its parts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from complete_fn.engines.call import Call
from complete_fn.engines.catalogue import Model
from complete_fn.engines.tokenizer import token_sizes
from complete_fn.errors import CompleteError, DamagedFileError, JobError, NotFoundError, StorageError
from complete_fn.execution.answers import DETAILS, Answers, committed_answers
from complete_fn.interrupts import Abandoned, end_if_abandoned
from complete_fn.jobs.job import Job, Part
from complete_fn.ledger.usage import mean_output
from complete_fn.planning import BatchPlan, make_plan
from complete_fn.planning.parts import estimated_tokens
from complete_fn.planning.prefix_tree import SLACK, cut_tree, shared_beginnings
from complete_fn.prompts.options import parse_options
from complete_fn.rows.formats import LineRows, Rows, TableRows
from complete_fn.service.state import ServiceState
from complete_fn.types import Asker, Completion

PART_TOKENS = 250_000  # tokens of a part's prompts and answers: about a minute of a small engine
PART_ROWS = 4_096
LIKELY_OUTPUT = 64  # tokens of an answer, for a model without answers in the ledger
WINDOWS = "windows.json"
CANCELLED = Completion.failed("cancelled", "The job was stopped before the row was done.")
DAMAGED = (
    "The file {name} of {job} is missing or damaged. Submit the rows again: what has a stored answer costs nothing."
)
LOST = (
    "The answers of part {number} of job {job} are lost: their file is missing or damaged, and not all of them are "
    "stored elsewhere. POST /v1/jobs/{job}/rerun, or `complete-fn jobs rerun {job}`, asks for them again; an answer "
    "that is stored costs nothing."
)
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
            table = pa.table({"row": pa.array(rows), "prompt": prompts})
            size += write_table(state, state.job_key(job.id, part_file(first + len(pieces))), table)
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
    return write_table(state, state.job_key(job, window_file(number)), table)


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


def write_result(state: ServiceState, part: Part, rows: Any, answers: Answers) -> tuple[str, int, int]:
    """Write a part's answers.

    Returns:
        The file's name, with a digest of its content; the number of rows without an answer; the file's bytes.
    """
    buffer = pa.BufferOutputStream()
    parquet.write_table(pa.table([rows, answers.details], schema=RESULT), buffer)
    content = buffer.getvalue()
    name = f"result-{part.number:05}-{part.claim}-{digest_of(content)}.parquet"
    with state.storage.writing(state.job_key(part.job, name)) as sink:
        sink.write(content)
    return name, answers.summary.failed.total(), len(content)


def read_result(state: ServiceState, part: Part, name: str) -> Any:
    """Raises:
    DamagedFileError: The file is missing, or has other bytes than were written.
    """
    with undamaged(part.job, name):
        with state.storage.reading(state.job_key(part.job, name)) as source:
            content = source.read()
        if digest_of(content) != Path(name).stem.rpartition("-")[2]:
            raise ValueError("other bytes")
        return parquet.read_table(pa.BufferReader(content), schema=RESULT)


def digest_of(content: Any) -> str:
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def write_table(state: ServiceState, key: str, table: Any) -> int:
    """Write a table; returns the bytes of its file."""
    with state.storage.writing(key) as sink:
        parquet.write_table(table, sink, write_page_checksum=True)
        return sink.tell()


def read_table(state: ServiceState, job: str, name: str) -> Any:
    """Raises:
    DamagedFileError: The file is missing, or is not what was written.
    """
    with undamaged(job, name), state.storage.reading(state.job_key(job, name)) as source:
        return parquet.read_table(source, page_checksum_verification=True)


@contextmanager
def undamaged(job: str, name: str) -> Iterator[None]:
    """Raise what a reader says of a job's damaged file as our own error. A storage that is away is no damage."""
    try:
        yield
    except CompleteError as error:
        if isinstance(error, NotFoundError):
            raise DamagedFileError(DAMAGED.format(job=job, name=name)) from error
        raise
    except Abandoned:
        raise
    except Exception as error:  # Arrow's readers raise OSError, ValueError, MemoryError and more
        raise DamagedFileError(DAMAGED.format(job=job, name=name)) from error


def read_prompts(state: ServiceState, part: Part) -> Any:
    """The part's rows: their numbers in the job, and their prompts.

    Raises:
        DamagedFileError: The file is missing or damaged.
    """
    return read_table(state, part.job, part_file(part.number))


def windows_of(state: ServiceState, job: Job) -> list[ResultWindow]:
    with undamaged(job.id, WINDOWS), state.storage.reading(state.job_key(job.id, WINDOWS)) as source:
        noted = json.loads(source.read())
    found, first = [], 0
    for number, window in enumerate(noted):
        found.append(ResultWindow(number, first, window["rows"], window["parts"]))
        first += window["rows"]
    return found


def rows_of(state: ServiceState, job: Job, window: ResultWindow) -> Rows:
    """The window's rows as they were submitted."""
    table = read_table(state, job.id, window_file(window.number))
    if (table.schema.metadata or {}).get(b"complete_fn") == LINES.metadata[b"complete_fn"]:
        return LineRows(table.column("line").to_pylist())
    return TableRows(table)


def details_of(
    state: ServiceState,
    job: Job,
    window: ResultWindow,
    parts: Sequence[Part],
    damaged: set[int] | None = None,
) -> Any:
    """[rows] DETAILS in the window's row order; NULL where the prompt was NULL, or the row has not been done yet.

    If a row was run again, the answer of the later part counts.

    Args:
        damaged: gets the ids of the parts whose answers are lost, which count as not done.

    Raises:
        JobError: A part's answers are lost, and `damaged` is None.
    """
    done = [RESULT.empty_table()]
    for part in parts:
        if part.number in window.parts and part.result:
            end_if_abandoned()
            try:
                done.append(result_of(state, job, part, part.result))
            except JobError:
                if damaged is None:
                    raise
                damaged.add(part.id)
    joined = pa.concat_tables(done).combine_chunks()
    at = np.full(window.rows, -1, np.int64)
    at[joined.column("row").to_numpy() - window.first] = np.arange(joined.num_rows)
    return joined.column("details").take(pa.array(at, mask=at < 0)).combine_chunks()


def result_of(state: ServiceState, job: Job, part: Part, name: str) -> Any:
    """The part's answers. If their file is damaged, it is made again from the answers that the store has.

    Raises:
        JobError: The file is damaged, and the store has not all answers either.
    """
    with suppress(DamagedFileError):
        return read_result(state, part, name)
    try:
        rows, answers = stored_result(state, job, part)
    except CompleteError as error:  # a model that has left the catalogue, or a part whose prompts are lost too
        if error.retryable:
            raise
        raise JobError(LOST.format(number=part.number, job=job.id)) from error
    if part.status == "done" and answers.summary.failed:
        raise JobError(LOST.format(number=part.number, job=job.id))
    with suppress(StorageError):  # the answers can be read, though a full disk may not take them
        made, *_ = write_result(state, part, rows, answers)
        state.jobs.replace_result(part, made)
    return pa.table([rows, answers.details], schema=RESULT)


def stored_result(state: ServiceState, job: Job, part: Part) -> tuple[Any, Answers]:
    """(row numbers, answers) of a part that has ended. Rows without a stored answer fail as `cancelled`."""
    table, options = read_prompts(state, part), parse_options(json.loads(part.options))
    call = Call.of(state.model(part.model), options)
    who = Asker(part.tenant, job.user, part.name, job.query_tag)
    cache = "on" if options.cache == "refresh" else options.cache  # what the part has refreshed is stored
    found = committed_answers(call, table.column("prompt"), state.store, who, cache, CANCELLED, ended=True)
    return table.column("row"), found
