"""DuckDB: `register(con)` gives a connection, its database and all its cursors the completion functions."""

from __future__ import annotations

import atexit
import contextlib
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import duckdb
import pyarrow as pa
from duckdb.func import ARROW, SPECIAL

from complete_fn.engines.base import Engine
from complete_fn.engines.stoppable import let_finish
from complete_fn.errors import CompleteError, InputError
from complete_fn.interrupts import INTERRUPTS
from complete_fn.types import Asker
from complete_fn_connectors.duckdb import cortex as snowflake
from complete_fn_connectors.duckdb.recent_failures import RecentFailures
from complete_fn_connectors.duckdb_query import planner as query
from complete_fn_connectors.duckdb_query.call_sites import SITE
from complete_fn_connectors.duckdb_query.collect import Memory, PlanTimeError, Remembering
from complete_fn_connectors.duckdb_query.estimate import QueryEstimate, estimate_query
from complete_fn_connectors.duckdb_query.explain import Explanation, explain_query
from complete_fn_connectors.duckdb_query.json_versions import drop_unread_rows
from complete_fn_connectors.duckdb_query.syntax_tree import Parameters
from complete_fn_connectors.functions import QuerySession
from complete_fn_connectors.sql_functions import SqlFunction, functions_of

Column = Any
Function = Callable[..., Column]

SQL_TYPES = {
    pa.large_string(): "VARCHAR",
    pa.string(): "VARCHAR",
    pa.bool_(): "BOOLEAN",
    pa.int64(): "BIGINT",
    pa.float64(): "DOUBLE",
}
WHOSE = "complete_fn_registration"  # the SQL function that returns the id of the registration that a cursor sees


class Registration:
    """The functions on one connection. Also a context manager: leaving it closes it.

    The connection keeps it alive through its functions; it lasts until close(), the connection's close() or the end
    of the process. It keeps the connection alive in turn, because DuckDB crashes when a cursor calls a function
    whose connection is gone.

    Attributes:
        session: the session that answers; all queries of the registration share its budget.
        error: the last error that a function raised, before DuckDB turned the error into text.
    """

    def __init__(self, con: duckdb.DuckDBPyConnection, session: QuerySession) -> None:
        self.con, self.session = con, session
        self.names: list[str] = []
        self.answering: list[Memory] = []
        self.catalog: snowflake.Catalog | None = None
        self.error: CompleteError | None = None
        self.failures = RecentFailures()

    def summary(self) -> str:
        """One line on all queries since the last call: rows, distinct, tokens, cost and its basis, failures."""
        return self.session.take_summary()

    def interrupt(self) -> None:
        """Stop all completions of this process, as Ctrl-C does; finished rows are kept. Add it to `con.interrupt()`,
        which stops a query only between two calls of a function."""
        INTERRUPTS.raise_all()

    def close(self) -> None:
        """Take the functions from the database, without touching its data; answers stay in the state folder.

        Raises:
            duckdb.Error: Rows of a query of the connection are still being read. DuckDB 1 drops these rows instead.
        """
        if self.names:
            drop_unread_rows(self.con)
        while self.names:
            with contextlib.suppress(duckdb.ConnectionException, duckdb.InvalidInputException):
                self.con.remove_function(self.names[-1])  # both mean that it is gone already
            self.names.pop()
        if self.catalog is not None:
            self.catalog.detach()
            self.catalog = None
        self.session.close()
        if REGISTERED.get(self.con, no_one)() is self:
            del REGISTERED[self.con]

    def __enter__(self) -> Registration:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def planned_names(self) -> dict[str, str]:
        """The functions whose calls `sql` plans, by the name in a query."""
        legacy = {f"snowflake.cortex.{n}": n for n in ("complete", "try_complete")} if self.catalog else {}
        return legacy | {n.removeprefix(SITE): n.removeprefix(SITE) for n in self.names if n.startswith(SITE)}

    def add(self, name: str, entry: SqlFunction) -> None:
        """Create a function, and a second one that `sql` calls in its place while it collects prompts."""
        function, kind = entry.function, sql_type(entry.result)

        def call(*columns: Column) -> Column:
            memories = list(self.answering)
            session = Remembering(self.session, memories) if memories else self.session
            return self.tried(name, function, session, columns)

        def collect(token: Column, *columns: Column) -> Column:
            run, _, site = token[0].as_py().rpartition(":")
            collector = query.COLLECTING.get(run)
            if collector is None:
                raise PlanTimeError
            try:
                return function(collector.at(int(site)), *columns)
            except CompleteError as error:  # in a round, raising would abort the user's transaction
                if collector.phase == "plan":
                    raise
                collector.fault = error
                return pa.nulls(len(token))

        self.create(name, call, kind)
        if entry.asks:
            self.create(SITE + name, collect, kind)

    def tried(self, name: str, function: Function, session: Any, columns: tuple[Column, ...]) -> Column:
        try:
            self.failures.raise_again(name, columns)
            return function(session, *columns)
        except BaseException as error:
            self.failures.note(name, columns, error)
            if isinstance(error, CompleteError):
                self.error = error
            raise

    def create(self, name: str, call: Function, kind: str) -> None:
        try:
            self.con.create_function(name, call, None, kind, type=ARROW, null_handling=SPECIAL)
        except (duckdb.CatalogException, duckdb.NotImplementedException) as error:
            raise InputError(
                f"This database has a function named {name!r} already. If another connection or cursor of it was "
                "registered, its functions work here too; close() that registration to set them up anew."
            ) from error
        self.names.append(name)


REGISTERED: weakref.WeakKeyDictionary[duckdb.DuckDBPyConnection, Callable[[], Registration | None]] = (
    weakref.WeakKeyDictionary()
)


def sql_type(kind: pa.DataType) -> str:
    """An Arrow type as DuckDB writes it."""
    if pa.types.is_struct(kind):
        return f"STRUCT({', '.join(f'{field.name} {sql_type(field.type)}' for field in kind)})"
    if pa.types.is_map(kind):
        return f"MAP({sql_type(kind.key_type)}, {sql_type(kind.item_type)})"
    if pa.types.is_list(kind):
        return f"{sql_type(kind.value_type)}[]"
    if pa.types.is_decimal(kind):
        return f"DECIMAL({kind.precision},{kind.scale})"
    return SQL_TYPES[kind]


def no_one() -> None:
    """Stands for a weak reference whose object is gone."""


def refuse_transaction(con: duckdb.DuckDBPyConnection) -> None:
    """Refuse a connection inside a transaction: a rollback would remove the functions, and cursors would not see them.

    Raises:
        InputError: The connection is inside a transaction.
    """
    if query.in_transaction(con):
        raise InputError("The connection is inside a transaction. COMMIT or ROLLBACK it, then register.")


def register(
    con: duckdb.DuckDBPyConnection | ModuleType,
    *,
    engine: Engine | str | None = None,
    prices: Mapping[str, Any] | None = None,
    max_cost: Any = None,
    max_total_tokens: int | None = None,
    home: Path | str | None = None,
    models_file: Path | str | None = None,
    cortex: bool = False,
    task_model: str | None = None,
    query_tag: str | None = None,
    progress: bool | None = None,
) -> Registration:
    """Add complete, try_complete, complete_details, prompt, count_tokens and the semantic functions to the database.

    All its cursors have them; nothing is written into the database. A second call on the same connection replaces
    the first.

    Args:
        con: a connection, or the module `duckdb` for its default connection.
        engine: URL of an OpenAI-compatible server or an `Engine`, for every model; None takes each model's own.
        prices: prices of `engine` per million tokens, like {"input": 0.15, "output": 0.6}; None takes the catalogue's.
        max_cost: cap on what all queries together spend. Rows that it does not cover are NULL with `budget_exceeded`.
        max_total_tokens: cap on the tokens of prompts and answers of all queries together.
        home: folder of answers and ledger; None takes COMPLETE_FN_HOME or the platform's user data folder.
        models_file: a TOML file whose models are added to the built-in catalogue, or override its models.
        cortex: also add Snowflake's functions: AI_COMPLETE, AI_CLASSIFY, AI_FILTER and so on, and SNOWFLAKE.CORTEX.*.
        task_model: the model that answers those of Snowflake's functions that name no model.
        query_tag: a text that the ledger notes with each line.
        progress: show a bar; None shows one when a person is looking.

    Raises:
        InputError: The connection is inside a transaction; or the database has functions of these names already, or,
            with `cortex`, a catalog `snowflake`.
        InvalidOptionError: `max_cost` is no amount, or `max_total_tokens` no whole number.
    """
    session = QuerySession(
        engine=engine,
        prices=prices,
        home=home,
        models_file=models_file,
        max_cost=max_cost,
        max_total_tokens=max_total_tokens,
        who=Asker(query_tag=query_tag),
        progress=progress,
        task_model=task_model,
    )
    con = connection_of(con)
    refuse_transaction(con)
    earlier = REGISTERED.get(con, no_one)()
    if earlier is not None:
        earlier.close()
    if cortex:
        snowflake.refuse_clash(con)
    INTERRUPTS.listen()
    registration = Registration(con, session)
    try:
        for name, function in functions_of(cortex).items():
            registration.add(name, function)
        me = str(id(registration))
        registration.create(WHOSE, lambda column: pa.array([me] * len(column)), "VARCHAR")
        if cortex:
            registration.catalog = snowflake.Catalog(con)
    except BaseException:
        registration.close()
        raise
    REGISTERED[con] = weakref.ref(registration)
    return registration


def connection_of(con: duckdb.DuckDBPyConnection | ModuleType) -> duckdb.DuckDBPyConnection:
    return duckdb.default_connection() if isinstance(con, ModuleType) else con


def registration_of(con: duckdb.DuckDBPyConnection | ModuleType) -> Registration:
    """The registration whose functions the connection or cursor sees.

    Raises:
        InputError: There is none.
    """
    con = connection_of(con)
    found = REGISTERED.get(con, no_one)()
    if found is not None:
        return found
    rows = con.execute(f"SELECT {WHOSE}(0)").fetchall() if has_function(con, WHOSE) else []
    for reference in REGISTERED.values():
        registration = reference()
        if registration is not None and rows == [(str(id(registration)),)]:
            return registration
    raise InputError("The connection has no completion functions. Call register(con) first.")


def has_function(con: duckdb.DuckDBPyConnection, name: str) -> bool:
    return bool(con.execute("SELECT 1 FROM duckdb_functions() WHERE function_name = ?", [name]).fetchall())


def sql(
    con: duckdb.DuckDBPyConnection | ModuleType,
    query_text: str,
    params: Parameters = None,
    *,
    max_cost: Any = None,
    max_total_tokens: int | None = None,
) -> Any:
    """Run a query once, with its completions planned as a whole instead of 2,048 rows at a time.

    First the query runs in collect mode: `sql` notes the prompts of its calls, then asks them as one plan per model.
    Where calls depend on each other, it does so in rounds. Then the query runs and finds every answer known.

    A query that succeeds has the result of `con.execute`, and never pays for a prompt that `con.execute` would not pay
    for. A query that fails while it runs (a cast of an answer, `strict`) may have paid for all its rows, where
    `con.execute` stops at the piece of 2,048 rows that fails. Queries that cannot be planned (see the README) run as by
    `con.execute`. Works on registered connections and their cursors, inside an open transaction too.

    Args:
        params: values of a prepared query's parameters, a sequence or a mapping by name.
        max_cost: cap on what this query spends, in the catalogue's currency. Rows that it does not cover are NULL with
            `budget_exceeded`. The registration's own cap holds too. Queries that other threads run on the registration
            meanwhile count as well.
        max_total_tokens: cap on the tokens of the query's prompts and answers together.

    Returns:
        A relation over the rows, which are not computed again; what `con.execute` returns for INSERT, CREATE and COPY
        (with a cap a relation of it).

    Raises:
        InputError: The connection is not registered, or another query of the registration has caps of its own now.
        InvalidOptionError: `max_cost` is no amount, or `max_total_tokens` no whole number.
        duckdb.Error: As `con.execute`.
    """
    con = connection_of(con)
    registration = registration_of(con)
    with registration.session.braked(max_cost, max_total_tokens):
        return query.run_query(con, registration, query_text, params)


def explain(con: duckdb.DuckDBPyConnection | ModuleType, query_text: str, params: Parameters = None) -> Explanation:
    """The plan of `sql`: its rounds, and for each call its prompts, guards and known answers. Asks no model.

    The query runs in collect mode as far as answers are known. Counts that depend on unknown answers are left open. For
    a query with a LIMIT that stops early, the counts are upper bounds.

    Raises:
        InputError: The connection is not registered.
        duckdb.Error: DuckDB refuses the query.
    """
    con = connection_of(con)
    return explain_query(con, registration_of(con), query_text, params)


def estimate(con: duckdb.DuckDBPyConnection | ModuleType, query_text: str, params: Parameters = None) -> QueryEstimate:
    """An estimate of `sql`: rows, tokens, cached share, price and device-seconds for each model. Asks no model.

    Calls whose prompts depend on unknown answers are listed as open.

    Raises:
        InputError: The connection is not registered.
        duckdb.Error: DuckDB refuses the query.
    """
    con = connection_of(con)
    return estimate_query(con, registration_of(con), query_text, params)


def close_all() -> None:
    """Close all registrations at exit. Otherwise nanobind reports functions and connections as leaked."""
    INTERRUPTS.raise_all()
    let_finish(1.0)
    for con, reference in list(REGISTERED.items()):
        registration = reference()
        with contextlib.suppress(duckdb.Error, AttributeError):  # DuckDB 1 has no abort() and needs none
            con.abort()
        if registration is not None:
            with contextlib.suppress(duckdb.Error):
                registration.close()


atexit.register(close_all)
