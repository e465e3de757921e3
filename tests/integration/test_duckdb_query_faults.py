"""`sql` where it went astray before: against the plain run, its rows, types, errors and what is paid."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import pytest

from complete_fn import Completion, CompletionRequest, EchoEngine, Usage
from complete_fn_connectors.duckdb import register, sql

TABLES = """
CREATE TABLE docs AS SELECT i AS id, 'doc ' || i AS text, i % 5 AS k FROM range(3000) r(i);
CREATE TABLE tags AS SELECT i AS id, 'tag ' || i AS name, i % 7 AS k FROM range(30) r(i);
CREATE TABLE tgt (id BIGINT PRIMARY KEY, a VARCHAR);
CREATE SEQUENCE s;
"""


class Numbers(EchoEngine):
    """Echoes, and says 7 to what begins with `num`."""

    def complete(self, request: CompletionRequest) -> Completion:
        if str(request.prompt).startswith("num"):
            return Completion("7", "stop", usage=Usage(1, 0, 1))
        return super().complete(request)


@dataclass
class Outcome:
    rows: Any = None
    types: Any = None
    error: str | None = None
    aborted: bool = False
    paid: Counter[str] | None = None

    @property
    def prompts(self) -> int:
        return (self.paid or Counter()).total()


@contextmanager
def connection(setup: Sequence[str] = ()) -> Iterator[tuple[duckdb.DuckDBPyConnection, Numbers]]:
    home, engine = Path(tempfile.mkdtemp()), Numbers()
    with duckdb.connect() as con:
        con.execute("SET threads = 1")  # the plain run pays by the piece, in an order of its own on several
        con.execute(TABLES)
        for statement in setup:
            con.execute(statement)
        with register(con, engine=engine, home=home, progress=False):
            yield con, engine
    shutil.rmtree(home)


def outcome(run: Any, setup: Sequence[str], before: Sequence[str]) -> Outcome:
    with connection(setup) as (con, engine):
        found = Outcome()
        for statement in before:
            con.execute(statement)
        try:
            result = run(con)
            found.types = [(name, str(kind)) for name, kind, *_ in result.description]
            found.rows = result.fetchall()
        except duckdb.Error as error:
            found.error = type(error).__name__
        if "BEGIN" in before:
            try:
                con.execute("SELECT 1").fetchall()
            except duckdb.TransactionException:
                found.aborted = True
            con.execute("ROLLBACK")
        found.paid = Counter(str(r.prompt) for r in engine.requests)
    return found


def both(query: str, setup: Sequence[str] = (), before: Sequence[str] = ()) -> tuple[Outcome, Outcome]:
    """What the plain run and `sql` make of a query; `before` is executed once the functions are there."""
    return outcome(lambda c: c.execute(query), setup, before), outcome(lambda c: sql(c, query), setup, before)


@pytest.mark.parametrize(
    "query",
    [
        "INSERT INTO nosuch SELECT complete('m', text) FROM docs",
        "INSERT INTO tgt SELECT complete('m', text), 1, 2 FROM docs",
        "INSERT INTO tgt(id, nope) SELECT id, complete('m', text) FROM docs",
        "CREATE TABLE nosuch.x AS SELECT complete('m', text) AS a FROM docs",
        "COPY (SELECT complete('m', text) FROM docs) TO 'never' (FORMAT nosuch)",
        """CREATE TABLE "a(b as" AS SELECT complete('m', text) AS x FROM docs""",
        "CREATE TABLE tgt(x) AS SELECT complete('m', text) FROM docs",
    ],
)
@pytest.mark.parametrize("before", [(), ("BEGIN",)])
def test_what_cannot_be_written_is_not_paid_for(query: str, before: tuple[str, ...]) -> None:
    plain, planned = both(query, ['CREATE TABLE "a(b as" (x VARCHAR)'], before)
    assert plain.error is not None
    assert (planned.error, planned.aborted) == (plain.error, plain.aborted)
    assert planned.prompts == plain.prompts == 0


def test_what_a_read_only_database_refuses_is_not_paid_for(tmp_path: Path) -> None:
    path = tmp_path / "kept.duckdb"
    with duckdb.connect(path) as con:
        con.execute("CREATE TABLE t (a VARCHAR)")
    setup = [f"ATTACH '{path}' AS kept (READ_ONLY)"]
    for query in ("INSERT INTO kept.t SELECT {} FROM docs", "CREATE TABLE kept.u AS SELECT {} AS a FROM docs"):
        plain, planned = both(query.format("complete('m', text)"), setup)
        assert (plain.error, planned.error) == ("InvalidInputException",) * 2
        assert planned.prompts == 0
