"""`register_jobs` adds SQL functions that submit jobs to a service and fetch their results later.

register_jobs(con, Client("http://host:8000", key))
SELECT complete_submit('SELECT id, body FROM reviews', 'demo-llama-swiftkv', 'Summarise: {body}');
SELECT * FROM complete_result('job-...');  -- on another day, from another process
"""

from __future__ import annotations

import json
from collections.abc import Callable
from decimal import Decimal
from functools import partial
from typing import Any

import duckdb
import pyarrow as pa

from complete_fn.client import Client
from complete_fn.errors import InputError

SUBMIT = """CREATE OR REPLACE TEMP MACRO complete_submit
(query, model, prompt) AS complete_submit_query(query, model, prompt, '{}'),
(query, model, prompt, options) AS complete_submit_query(query, model, prompt, options)"""
RESULT = """CREATE OR REPLACE TEMP MACRO complete_result(job) AS TABLE
SELECT json_extract(line, '$.row') AS "row", json_extract_string(line, '$.completion') AS completion
FROM (SELECT unnest(complete_result_lines(job)) AS line)"""
PROGRESS = (
    'STRUCT(status VARCHAR, "rows" BIGINT, done BIGINT, failed BIGINT, cost DECIMAL(18,9), seconds_left DOUBLE, '
    "error VARCHAR)"
)


def register_jobs(con: duckdb.DuckDBPyConnection, client: Client) -> None:
    """Add complete_submit, complete_result, complete_progress and complete_cancel for the jobs of a service.

    complete_submit(query, model, prompt [, options]) gives the job's id: the query's rows are uploaded as they are
    committed now (temporary tables are not seen), prompt is a template over its columns, options are JSON text.
    complete_result(job) is a table of the rows finished so far: "row" (JSON) and completion, NULL where it failed; it
    and complete_submit are temporary macros, which cursors do not see. complete_progress(job) is a STRUCT.

    Raises:
        InputError: the database has functions of these names that are not ours to replace.
    """
    functions: dict[str, tuple[Callable[..., Any], list[str], str]] = {
        "complete_submit_query": (partial(submit, con, client), ["VARCHAR"] * 4, "VARCHAR"),
        "complete_result_lines": (partial(result_lines, client), ["VARCHAR"], "VARCHAR[]"),
        "complete_progress": (partial(progress, client), ["VARCHAR"], PROGRESS),
        "complete_cancel": (partial(cancel, client), ["VARCHAR"], "VARCHAR"),
    }
    for name, (function, takes, gives) in functions.items():
        try:
            con.create_function(name, function, takes, gives, side_effects=True)  # type: ignore[arg-type]
        except (duckdb.CatalogException, duckdb.NotImplementedException) as error:
            raise InputError(f"This database has a function named {name!r} already. Open another one.") from error
    con.execute(SUBMIT)
    con.execute(RESULT)


def submit(con: duckdb.DuckDBPyConnection, client: Client, query: str, model: str, prompt: str, options: str) -> str:
    """Submit the rows of a query as a job; returns the job's id."""
    try:
        chosen = json.loads(options)
    except ValueError as error:
        raise InputError(f"The options are no JSON object: {error}.") from error
    if not isinstance(chosen, dict):
        raise InputError(f"options = {options!r} is no JSON object.")
    with con.cursor() as cursor:  # the connection itself is busy with the statement that submits
        statements = cursor.extract_statements(query)
        if len(statements) != 1 or statements[0].type != duckdb.StatementType.SELECT:
            raise InputError("The query must be one SELECT.")
        rows: pa.Table = cursor.sql(query).to_arrow_table()
    return client.submit(rows, model, prompt, options=chosen).id


def result_lines(client: Client, job: str) -> list[str]:
    """[n] JSON objects with row and completion, of the rows finished so far."""
    found = client.job(job).results(partial=True)
    lines = []
    for row in found.to_pylist():
        completion = row.pop("completion")
        lines.append(json.dumps({"row": row, "completion": completion}, default=str))
    return lines


def progress(client: Client, job: str) -> dict[str, Any]:
    state = client.job(job).state()
    rows = state["rows"]
    return {
        "status": state["status"],
        "rows": rows["total"],
        "done": rows["done"],
        "failed": rows["failed"],
        "cost": Decimal(state["cost"]["amount"]),
        "seconds_left": state.get("eta_seconds"),
        "error": state.get("error"),
    }


def cancel(client: Client, job: str) -> str:
    client.job(job).cancel()
    return str(client.job(job).state()["status"])
