"""DuckDB: `register(con)` gives a connection, its database and all its cursors the completion functions."""

from __future__ import annotations

import atexit
import contextlib
import weakref
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import duckdb
from duckdb.func import ARROW, SPECIAL

from complete_fn.engine import Engine
from complete_fn.errors import CompleteError, InputError
from complete_fn.types import Asker
from complete_fn_connectors import cortex as snowflake
from complete_fn_connectors import functions
from complete_fn_connectors.functions import QuerySession
from complete_fn_connectors.interrupt import INTERRUPTS
from complete_fn_connectors.planning import at_plan_time, places

Column = Any
Function = Callable[..., Column]

DETAILS = (
    'STRUCT("value" VARCHAR, error STRUCT(code VARCHAR, message VARCHAR), finish_reason VARCHAR, '
    "usage STRUCT(prompt_tokens BIGINT, cached_tokens BIGINT, completion_tokens BIGINT), "
    "cost DECIMAL(18,9), source VARCHAR)"
)
FUNCTIONS: dict[str, tuple[Function, str]] = {
    "complete": (functions.complete, "VARCHAR"),
    "try_complete": (functions.try_complete, "VARCHAR"),
    "complete_details": (functions.complete_details, DETAILS),
    "prompt": (functions.prompt, "STRUCT(template VARCHAR, fields MAP(VARCHAR, VARCHAR))"),
    "count_tokens": (functions.count_tokens, "BIGINT"),
}
FREE = ("prompt",)  # reach no engine, so they may be folded


class PlanTimeError(CompleteError):
    """Nothing is completed while a query is planned."""


class Registration:
    """The functions on one connection. Also a context manager: leaving it closes it.

    The connection keeps it alive through its functions; it lasts until close(), the connection's close() or the end
    of the process. It keeps the connection alive in turn, because DuckDB crashes when a cursor calls a function
    whose connection is gone.

    Attributes:
        session: what answers; its budget is shared by all queries of the registration.
        error: the last error a function raised, as it was before DuckDB turned it into text.
    """

    def __init__(self, con: duckdb.DuckDBPyConnection, session: QuerySession) -> None:
        self.con, self.session = con, session
        self.names: list[str] = []
        self.catalog: snowflake.Catalog | None = None
        self.error: CompleteError | None = None

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
            duckdb.Error: a query of the connection is still being read.
        """
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

    def add(self, name: str, function: Function, kind: str) -> None:
        def call(*columns: Column) -> Column:
            if name not in FREE and len(columns[0]) == 1 and at_plan_time():
                raise PlanTimeError
            try:
                return function(self.session, *columns)
            except CompleteError as error:
                self.error = error
                raise

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


def no_one() -> None:
    """What a dead weak reference says."""


def refuse_transaction(con: duckdb.DuckDBPyConnection) -> None:
    """Functions made inside a transaction are gone with its rollback, and cursors do not see them before.

    Raises:
        InputError: the connection is inside one.
    """
    first, second = (con.execute("SELECT txid_current()").fetchall() for _ in range(2))
    if first == second:
        raise InputError("The connection is inside a transaction. COMMIT or ROLLBACK it, then register.")


def register(
    con: duckdb.DuckDBPyConnection | ModuleType,
    *,
    engine: Engine | str | None = None,
    max_cost: Any = None,
    home: Path | str | None = None,
    models_file: Path | str | None = None,
    cortex: bool = False,
    query_tag: str | None = None,
    progress: bool | None = None,
) -> Registration:
    """Add complete, try_complete, complete_details, prompt and count_tokens to the connection's database.

    All its cursors have them; nothing is written into the database. A second call on the same connection replaces
    the first.

    Args:
        con: a connection, or the module `duckdb` for its default connection.
        engine: URL of an OpenAI-compatible server or an `Engine`, for every model; None takes each model's own.
        max_cost: all queries together never spend more; what it does not cover is NULL with `budget_exceeded`.
        home: folder of answers and ledger; None takes COMPLETE_FN_HOME or the platform's.
        models_file: TOML over the built-in catalogue.
        cortex: also answer to AI_COMPLETE and SNOWFLAKE.CORTEX.COMPLETE, TRY_COMPLETE and COUNT_TOKENS.
        query_tag: marks the ledger's lines.
        progress: show a bar; None shows one when a person is looking.

    Raises:
        InputError: the connection is inside a transaction; or the database has functions of these names, or a
            catalog `snowflake` with `cortex`.
        InvalidOptionError: `max_cost` is no amount.
    """
    session = QuerySession(
        engine=engine,
        home=home,
        models_file=models_file,
        max_cost=max_cost,
        who=Asker(query_tag=query_tag),
        progress=progress,
    )
    con = duckdb.default_connection() if isinstance(con, ModuleType) else con
    refuse_transaction(con)
    earlier = REGISTERED.get(con, no_one)()
    if earlier is not None:
        earlier.close()
    if cortex:
        snowflake.refuse_clash(con)
    INTERRUPTS.listen()
    places()
    registration = Registration(con, session)
    try:
        for name, (function, kind) in (FUNCTIONS | (snowflake.CORTEX_TYPES if cortex else {})).items():
            registration.add(name, function, kind)
        if cortex:
            registration.catalog = snowflake.Catalog(con)
    except BaseException:
        registration.close()
        raise
    REGISTERED[con] = weakref.ref(registration)
    return registration


def close_all() -> None:
    """At exit: without it nanobind reports the functions and their connections as leaked."""
    INTERRUPTS.raise_all()
    INTERRUPTS.let_finish(1.0)
    for con, reference in list(REGISTERED.items()):
        registration = reference()
        with contextlib.suppress(duckdb.Error, AttributeError):  # DuckDB 1 has no abort() and needs none
            con.abort()
        if registration is not None:
            with contextlib.suppress(duckdb.Error):
                registration.close()


atexit.register(close_all)
