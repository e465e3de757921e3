"""The final run of a query: it is executed once, and its rows are kept with DuckDB's own values and types."""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Callable, Mapping
from functools import partial
from types import FunctionType
from typing import Any

import duckdb

from complete_fn.rows.identifiers import quote_name
from complete_fn_connectors.duckdb_query.collect import (
    Functions,
)
from complete_fn_connectors.duckdb_query.json_versions import statement_texts
from complete_fn_connectors.duckdb_query.syntax_tree import (
    Parameters,
)


def run_at_last(
    con: duckdb.DuckDBPyConnection, functions: Functions, query: str, selects: bool, parameters: Parameters
) -> Any:
    if selects:
        return materialise(con, query, parameters)
    if not functions.session.brake:
        return as_caller(con.execute, query, parameters or [])
    *before, last = statement_texts(con, query)
    for statement in before:
        as_caller(con.execute, statement)
    return materialise(con, last, parameters)  # what streams would ask when the brake is off again


def as_caller(method: Callable[..., Any], *arguments: Any) -> Any:
    """Call a method of DuckDB as if the user's code called it. DuckDB finds data frames by the caller's variables."""
    frame = sys._getframe(1)
    while frame.f_back is not None and str(frame.f_globals.get("__name__", "")).startswith("complete_fn_connectors"):
        frame = frame.f_back
    scope = {**frame.f_globals, **frame.f_locals}
    return FunctionType((lambda _method, _arguments: _method(*_arguments)).__code__, scope)(method, arguments)


def forbids_another_run(con: duckdb.DuckDBPyConnection, error: Exception) -> bool:
    """Whether an error forbids another run: the user interrupted the query, or the user's transaction is aborted."""
    if isinstance(error, duckdb.InterruptException):
        return True
    try:
        con.execute("SELECT 1").fetchall()
    except duckdb.Error:
        return True
    return False


def is_query(con: duckdb.DuckDBPyConnection, query: str) -> bool:
    """Whether the last statement gives rows and changes nothing."""
    statements = con.extract_statements(query)
    only_rows = [duckdb.ExpectedResultType.QUERY_RESULT]
    return len(statements) == 1 and list(statements[0].expected_result_type) == only_rows


def materialise(con: duckdb.DuckDBPyConnection, query: str, parameters: Parameters) -> Any:
    """Execute one statement once, and return a relation over its rows with DuckDB's own values, names and types.

    `con.sql` executes a SELECT each time it is read. It executes an EXECUTE once and keeps the rows, so the statement
    is prepared.
    """
    statement, *more = con.extract_statements(query)
    name = f"complete_fn_run{next(RUNS)}"
    if more:
        return materialise_pivot(con, name, query, parameters)
    if statement.type not in (duckdb.StatementType.SELECT, duckdb.StatementType.MULTI):
        done = as_caller(partial(con.sql, query, params=parameters or None))
        return con if done is None else done
    given = dict(parameters) if isinstance(parameters, Mapping) else dict(enumerate(parameters or (), 1))
    if {str(parameter) for parameter in given} != statement.named_parameters or not try_prepare(con, name, query):
        return as_caller(con.execute, query, parameters or [])  # says what is wrong in its own words
    found = execute_prepared(con, name, given)
    if not any(column.rpartition("_")[2].isdigit() for column in found.columns):
        return found
    names = [row[0] for row in as_caller(con.execute, f"DESCRIBE {query}", parameters or []).fetchall()]
    renamed = [f"{quote_name(have)} AS {quote_name(column)}" for have, column in zip(found.columns, names, strict=True)]
    return found.project(", ".join(renamed))  # of two columns `a` it makes `a` and `a_1`


def try_prepare(con: duckdb.DuckDBPyConnection, name: str, query: str) -> bool:
    try:
        as_caller(con.execute, f"PREPARE {name} AS {query}")
    except duckdb.Error as error:
        if forbids_another_run(con, error):
            raise
        return False
    return True


def execute_prepared(con: duckdb.DuckDBPyConnection, name: str, given: Mapping[Any, Any]) -> Any:
    """EXECUTE a prepared statement. EXECUTE takes no parameters from Python, so they are handed over as variables."""
    variables = {parameter: f"{name}_{number}" for number, parameter in enumerate(given)}
    arguments = [
        f"{quote_name(p) + ' := ' if isinstance(p, str) else ''}getvariable('{variable}')"
        for p, variable in variables.items()
    ]
    try:
        for parameter, variable in variables.items():
            con.execute(f"SET VARIABLE {variable} = ?", [given[parameter]])
        return as_caller(con.sql, f"EXECUTE {name}({', '.join(arguments)})" if arguments else f"EXECUTE {name}")
    finally:
        for statement in (f"DEALLOCATE {name}", *(f"RESET VARIABLE {variable}" for variable in variables.values())):
            with contextlib.suppress(duckdb.Error):
                con.execute(statement)


RUNS = itertools.count(1)


def materialise_pivot(con: duckdb.DuckDBPyConnection, name: str, pivot: str, parameters: Parameters) -> Any:
    """A relation over the rows of a PIVOT. DuckDB 1.x makes two statements of a PIVOT and cannot prepare it."""
    as_caller(con.execute, f"CREATE TEMP TABLE {name} AS {pivot}", parameters or [])
    try:
        con.execute(f"PREPARE {name} AS FROM {name}")
        return execute_prepared(con, name, {})
    finally:
        con.execute(f"DROP TABLE {name}")
