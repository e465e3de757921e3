"""Calls whose arguments are all constant: DuckDB evaluates them while it plans, wherever it needs the value or not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import pytest

from complete_fn import Completion, CompletionRequest
from complete_fn.errors import EngineError
from complete_fn_connectors.duckdb import estimate, explain, register, sql
from complete_fn_connectors.duckdb.recent_failures import SECONDS, RecentFailures
from tests.engines import Counting


@pytest.fixture
def engine() -> Counting:
    return Counting()


@pytest.fixture
def con(engine: Counting, tmp_path: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    with duckdb.connect() as opened:
        opened.execute("CREATE TABLE docs AS SELECT i AS id, 'doc ' || i AS text FROM range(5) r(i)")
        opened.execute("CREATE TABLE t (id INTEGER, a VARCHAR NOT NULL)")
        register(opened, engine=engine, home=tmp_path, cortex=True, progress=False)
        yield opened


# {c} stands for a constant call and answers `c`, {d} for another.
QUERIES = {
    "SELECT {c}": "c",
    "SELECT {c} FROM docs": "c",
    "SELECT {c}, {d}, {c} FROM docs": "cd",
    "SELECT complete('m', {c} || 'x')": "c",
    "VALUES (1, {c}), (2, {d})": "cd",
    "SELECT * FROM (VALUES (1, {c}), (2, 'x')) v(id, a)": "c",
    "SELECT string_agg(text, {c}) FROM docs": "c",
    "SELECT * FROM range(length({c}))": "c",
    "SELECT unnest([{c}, 'x'])": "c",
    "SELECT strftime(DATE '2020-01-01' + id::INT, '%Y' || {c}) FROM docs": "c",
    "SELECT list_sort(['b', 'a'], replace({c}, 'c', 'ASC'))": "c",
    "SELECT id FROM docs WHERE coalesce({c}, 'y') = 'y' OR true": "c",
    "SELECT id FROM docs WHERE NOT (coalesce({c}, 'y') = 'y' OR id = 1)": "c",
    "SELECT id FROM docs WHERE {c} = 'c' AND id > 2": "c",
    "SELECT id FROM docs WHERE text LIKE {c} || '%'": "c",
    "SELECT id FROM docs WHERE regexp_matches(text, {c})": "c",
    "SELECT text IN ({c}, {d}) FROM docs": "cd",
    "SELECT 1 FROM docs LIMIT length({c})": "c",
    "SELECT id FROM docs LIMIT CASE WHEN coalesce({c}, 'y') = 'y' THEN 3 ELSE 2 END": "c",
    "SELECT CASE WHEN coalesce({c}, 'y') = 'y' THEN 'yes' ELSE text END FROM docs": "c",
    "SELECT if(coalesce({c}, 'y') = 'y', text, 'a') FROM docs": "c",
    "SELECT quantile_cont(id, length({c}) / 10) FROM docs": "c",
    "SELECT date_part(replace({c}, 'c', 'year'), DATE '2020-01-01' + id::INT) FROM docs": "c",
    "SELECT json_extract('{{\"c\": 1}}', {c}) FROM docs": "c",
    "SELECT count(*) FROM docs GROUP BY {c}": "c",
    "SELECT id FROM docs ORDER BY {c} || id": "c",
    "SELECT row_number() OVER (PARTITION BY {c} ORDER BY id) FROM docs": "c",
    "SELECT SNOWFLAKE.CORTEX.COMPLETE('m', 'c'), AI_COMPLETE(model => 'm', prompt => 'd')": "cd",
    "SELECT complete_details('m', 'c', {{'max_tokens': 2}})['value'], try_complete('m', 'd')": "cd",
    "SELECT complete('m', prompt('{{x}}', {{'x': 'c'}}))": "c",
    "WITH w AS (SELECT {c} AS a) SELECT a, text FROM w, docs": "c",
    "SELECT (SELECT {c}), text FROM docs": "c",
    "SELECT d.id FROM docs d JOIN docs e ON d.id = e.id AND e.text > {c}": "c",
}


def written(query: str) -> str:
    return query.format(c="complete('m', 'c')", d="complete('m', 'd')")


def plain_value(query: str) -> str:
    """The query with the answers in place of the calls (the engine echoes)."""
    return query.format(c="'c'", d="'d'")


@pytest.mark.parametrize("query", [q for q in QUERIES if "{c}" in q and "complete" not in q])
def test_a_constant_call_is_worth_its_answer(con: duckdb.DuckDBPyConnection, engine: Counting, query: str) -> None:
    expected = con.execute(plain_value(query)).fetchall()
    assert con.execute(written(query)).fetchall() == expected
    assert sql(con, written(query)).fetchall() == expected
    con.execute(f"PREPARE later AS {written(query)}")
    assert con.execute("EXECUTE later").fetchall() == expected
    assert sorted(engine.asked()) == sorted(QUERIES[query])  # each once, in all five statements


@pytest.mark.parametrize("query", QUERIES)
def test_explain_and_estimate_ask_nothing_and_sql_no_more_than_it_must(
    con: duckdb.DuckDBPyConnection, engine: Counting, query: str
) -> None:
    assert str(explain(con, written(query)))
    assert str(estimate(con, written(query)))
    assert engine.requests == []
    rows = sql(con, written(query)).fetchall()
    asked = engine.asked()
    assert len(asked) == len(set(asked))
    assert set(QUERIES[query]) <= set(asked)
    assert con.execute(written(query)).fetchall() == rows
    assert engine.asked() == asked  # the plain run pays for the same
    assert str(explain(con, written(query)))
    assert engine.asked() == asked


INSERTS = (
    "INSERT INTO t VALUES (1, {c})",
    "INSERT INTO t VALUES (1, {c}), (2, {d})",
    "INSERT INTO t SELECT 1, {c}",
    "INSERT INTO t SELECT * FROM (VALUES (1, {c})) v",
    "CREATE TABLE made AS SELECT 1 AS id, {c} AS a",
)


@pytest.mark.parametrize("run", [duckdb.DuckDBPyConnection.execute, sql], ids=["execute", "sql"])
@pytest.mark.parametrize("begin", [False, True], ids=["", "transaction"])
@pytest.mark.parametrize("statement", INSERTS)
def test_constants_are_inserted(
    con: duckdb.DuckDBPyConnection, engine: Counting, statement: str, begin: bool, run: Any
) -> None:
    if begin:
        con.execute("BEGIN")
    run(con, written(statement))
    table = "made" if "made" in statement else "t"
    expected = [(1, "c"), (2, "d")][: statement.count("complete") or statement.count("{")]
    assert con.execute(f"FROM {table} ORDER BY id").fetchall() == expected
    assert sorted(engine.asked()) == [a for _, a in expected]
    if begin:
        con.execute("ROLLBACK")
        assert con.execute("SELECT count(*) FROM t").fetchall() == [(0,)]


def test_executemany_asks_each_row_once(con: duckdb.DuckDBPyConnection, engine: Counting) -> None:
    con.executemany("INSERT INTO t VALUES (?, complete('m', ?))", [[1, "a"], [2, "b"], [3, "a"]])
    assert con.execute("FROM t ORDER BY id").fetchall() == [(1, "a"), (2, "b"), (3, "a")]
    assert engine.asked() == ["a", "b"]


def test_a_parameter_is_as_good_as_a_constant(con: duckdb.DuckDBPyConnection, engine: Counting) -> None:
    con.execute("PREPARE ask AS SELECT complete('m', $1)")
    assert engine.requests == []
    assert con.execute("EXECUTE ask('now')").fetchall() == [("now",)]
    assert sql(con, "SELECT complete('m', ?)", ["and now"]).fetchall() == [("and now",)]
    assert len(engine.requests) == 2


@pytest.mark.parametrize("statement", ["EXPLAIN {}", "PREPARE later AS {}", "DESCRIBE {}", "CREATE VIEW planned AS {}"])
def test_planning_alone_costs_at_most_the_constant(
    con: duckdb.DuckDBPyConnection, engine: Counting, statement: str
) -> None:
    query = "SELECT complete('m', text) AS b, complete('m', 'c') AS a FROM docs"
    con.execute(statement.format(query)).fetchall()
    assert engine.asked() in ([], ["c"])
    assert con.execute(query).fetchall() == [(f"doc {i}", "c") for i in range(5)]
    assert engine.asked().count("c") == 1
    assert len(engine.requests) == 6


def test_a_condition_that_a_constant_decides_spares_the_rows(con: duckdb.DuckDBPyConnection, engine: Counting) -> None:
    query = "SELECT complete('m', text) FROM docs WHERE complete('m', 'no') = 'yes'"
    assert [s.prompts for s in explain(con, query).sites] in ([1, None], [None, 1])
    assert sql(con, query).fetchall() == []
    assert engine.asked() == ["no"]
    assert sql(con, query.replace("'yes'", "'no'")).fetchall() == [(f"doc {i}",) for i in range(5)]
    assert engine.submissions == [1, 5]


def test_only_the_branch_that_a_constant_chooses_is_asked(
    con: duckdb.DuckDBPyConnection, engine: Counting, tmp_path: Path
) -> None:
    query = "SELECT CASE WHEN complete('m', 'c') = 'c' THEN complete('m', 'd') ELSE complete('m', 'e') END"
    with duckdb.connect() as other, register(other, engine=(plain := Counting()), home=tmp_path / "plain"):
        other.execute(query).fetchall()
    assert sql(con, query).fetchall() == [("d",)]
    assert set(engine.asked()) <= set(plain.asked())


def test_a_view_may_have_constants(con: duckdb.DuckDBPyConnection, engine: Counting) -> None:
    con.execute("CREATE VIEW v AS SELECT id, complete('m', 'c') AS a, complete('m', text) AS b FROM docs")
    before = engine.asked()
    explain(con, "SELECT a, b FROM v WHERE id < 2")
    estimate(con, "SELECT a, b FROM v WHERE id < 2")
    assert engine.asked() == before
    assert sql(con, "SELECT a, b FROM v WHERE id < 2").fetchall() == [("c", "doc 0"), ("c", "doc 1")]
    assert sorted(engine.asked()) == ["c", "doc 0", "doc 1"]


def test_more_constants_than_submissions_are_worth_run_plainly(
    con: duckdb.DuckDBPyConnection, engine: Counting
) -> None:
    query = " UNION ALL ".join(f"SELECT complete('m', 'c{i}')" for i in range(50))
    assert len(sql(con, query).fetchall()) == 50
    assert len(engine.requests) == 50


def test_explain_names_the_constant_that_comes_first(con: duckdb.DuckDBPyConnection) -> None:
    query = "SELECT complete('m', text) FROM docs WHERE text LIKE complete('m', 'doc 1')"
    text = str(explain(con, query))
    assert "constant: asked while DuckDB plans" in text
    assert "depend on answers of an earlier round" in text
    assert "ROUND 2" in text
    assert "NOT KNOWN BEFORE" in str(estimate(con, query))
    assert sql(con, query).fetchall() == [("doc 1",)]
    assert [s.known for s in explain(con, query).sites] == [1, 1]


class Failing(Counting):
    """Fails as an engine that cannot start does."""

    def stream(self, requests: Any, tenant: str) -> Iterator[tuple[int, Completion]]:
        self.submissions.append(1)
        raise EngineError("The engine cannot start.")
        yield


def test_an_engine_that_cannot_start_is_tried_once_a_statement(tmp_path: Path) -> None:
    engine = Failing()
    with duckdb.connect() as con, register(con, engine=engine, home=tmp_path):
        con.execute("CREATE TABLE docs AS SELECT 'doc' AS text FROM range(5)")
        for query in (
            "SELECT complete('m', 'c')",
            "SELECT text FROM docs WHERE complete('m', 'd') = complete('m', 'e')",
        ):
            engine.submissions.clear()
            with pytest.raises(duckdb.Error, match="The engine cannot start"):
                con.execute(query).fetchall()
            assert len(engine.submissions) <= 1


def test_a_strict_row_that_fails_is_paid_once(con: duckdb.DuckDBPyConnection, engine: Counting) -> None:
    with pytest.raises(duckdb.Error, match="RowFailedError"):
        con.execute("SELECT complete('m', 'bad', {'strict': true}) FROM docs").fetchall()
    assert engine.asked() == ["bad"]


def test_a_wrong_constant_call_is_told(con: duckdb.DuckDBPyConnection, engine: Counting) -> None:
    for run in (duckdb.DuckDBPyConnection.execute, sql):
        with pytest.raises(duckdb.Error, match="InputError: The prompt is int32"):
            run(con, "SELECT complete('m', 42)").fetchall()
    assert engine.requests == []


def test_a_failure_is_raised_again_for_what_would_fail_again_and_not_for_long() -> None:
    now = 0.0
    failures = RecentFailures(lambda: now)
    call, other_call, other_model = (["m"], ["a"]), (["m"], ["b"]), (["n"], ["a"])
    failures.note("complete", (["m"] * 2, ["a"] * 2), EngineError("of many rows, which DuckDB does not drop"))
    failures.raise_again("complete", call)
    failures.note("complete", call, EngineError("it cannot start"))
    for again in (call, other_call):
        with pytest.raises(EngineError, match="it cannot start"):
            failures.raise_again("complete", again)
    failures.raise_again("complete", other_model)
    now = SECONDS
    failures.raise_again("complete", call)
    failures.note("complete", call, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        failures.raise_again("complete", other_model)


def test_a_blocked_constant_is_null_in_every_caller(con: duckdb.DuckDBPyConnection, engine: Counting) -> None:
    def refused(request: CompletionRequest) -> Completion:
        return Completion.failed("blocked", "Refused.")

    engine.complete = refused  # type: ignore[method-assign]
    with pytest.warns(UserWarning, match="blocked"):
        assert sql(con, "SELECT complete('m', 'c') IS NULL").fetchall() == [(True,)]
    with pytest.warns(UserWarning, match="blocked"):
        assert con.execute("SELECT complete('m', 'c') IS NULL").fetchall() == [(True,)]
