"""Planning a query reaches no engine: EXPLAIN, PREPARE, DESCRIBE, and everything a client asks of a relation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import duckdb
import pytest

from complete_fn import EchoEngine
from complete_fn_connectors.duckdb import register
from complete_fn_connectors.planning import places

pytestmark = pytest.mark.skipif(not places().optional, reason="the C library of this platform has no backtrace()")


@pytest.fixture
def engine() -> EchoEngine:
    return EchoEngine()


@pytest.fixture
def con(engine: EchoEngine, tmp_path: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    with duckdb.connect() as opened:
        opened.execute("CREATE TABLE docs AS SELECT i AS id, 'doc ' || i AS text FROM range(5) r(i)")
        register(opened, engine=engine, home=tmp_path, cortex=True)
        yield opened


CONSTANT = [
    "SELECT complete('m', 'const')",
    "SELECT complete_details('m', 'const', {'max_tokens': 2})['value']",
    "SELECT try_complete('m', 'const')",
    "SELECT AI_COMPLETE(model => 'm', prompt => 'const')",
    "SELECT SNOWFLAKE.CORTEX.COMPLETE('m', 'const')",
    "SELECT complete('m', prompt('Say {x}', {'x': 'const'}))",
    "SELECT id FROM docs WHERE text = complete('m', 'doc 1')",
    "SELECT id FROM docs WHERE complete('m', 'const') = 'const' AND id > 2",
    "SELECT coalesce(complete('m', 'const'), 'x') || complete('m', 'other') FROM docs ORDER BY complete('m', 'const')",
    "SELECT text IN (complete('m', 'doc 1'), complete('m', 'doc 2')) FROM docs",
    "SELECT CASE WHEN id > complete('m', '1')::INT THEN complete('m', 'a') ELSE complete('m', 'b') END FROM docs",
    "SELECT complete('m', text) FROM docs",
]


@pytest.mark.parametrize("query", CONSTANT)
def test_planning_asks_nothing_and_running_asks(con: duckdb.DuckDBPyConnection, engine: EchoEngine, query: str) -> None:
    plan = con.execute(f"EXPLAIN {query}").fetchall()[0][1]
    assert "PROJECTION" in plan.upper() or "FILTER" in plan.upper()
    con.execute(f"PREPARE later AS {query}")
    con.execute(f"DESCRIBE {query}").fetchall()
    con.execute(f"CREATE VIEW planned AS {query.replace('SELECT ', 'SELECT 1 AS one, ', 1)}")
    relation = con.sql(query)
    assert len(relation.columns) == len(relation.types) == 1
    assert engine.requests == []
    first = con.execute("EXECUTE later").fetchall()
    asked = len(engine.requests)
    assert asked > 0
    assert con.execute(query).fetchall() == first
    assert len(engine.requests) == asked


def test_a_constant_call_is_made_once_and_its_error_is_told(con: duckdb.DuckDBPyConnection, engine: EchoEngine) -> None:
    assert con.execute("SELECT complete('m', 'const') FROM docs").fetchall() == [("const",)] * 5
    assert len(engine.requests) == 1
    with pytest.raises(duckdb.Error, match="InputError: The prompt is int32"):
        con.execute("SELECT complete('m', 42)").fetchall()


def test_a_parameter_is_as_good_as_a_constant(con: duckdb.DuckDBPyConnection, engine: EchoEngine) -> None:
    con.execute("PREPARE ask AS SELECT complete('m', $1)")
    assert engine.requests == []
    assert con.execute("EXECUTE ask('now')").fetchall() == [("now",)]
    assert con.execute("SELECT complete('m', ?)", ["and now"]).fetchall() == [("and now",)]
    assert len(engine.requests) == 2


@pytest.mark.parametrize(
    ("query", "rows"),
    [
        ("SELECT 1 FROM docs LIMIT length(complete('m', 'ab'))", 2),
        ("SELECT * FROM range(length(complete('m', 'abc')))", 3),
        ("VALUES (complete('m', 'x'))", 1),
        ("SELECT CASE WHEN complete('m', 'x') = 'x' THEN 1 END", 1),
        ("SELECT CASE WHEN coalesce(complete('m', 'x'), 'y') = 'x' THEN complete('m', text) END FROM docs", 5),
        ("SELECT count(*) FROM docs GROUP BY complete('m', 'x')", 1),
    ],
)
def test_where_duckdb_needs_a_value_to_plan_it_gets_one(con: duckdb.DuckDBPyConnection, query: str, rows: int) -> None:
    assert len(con.execute(query).fetchall()) == rows


UNCAUGHT = [
    "SELECT CASE WHEN coalesce({c}, 'y') = 'y' THEN complete('m', complete('m', text)) ELSE text END FROM docs",
    "SELECT CASE WHEN {c} = 'y' THEN text WHEN id = 1 THEN 'a' ELSE 'b' END FROM docs",
    "SELECT if(coalesce({c}, 'y') = 'y', text, 'a') FROM docs",
    "SELECT id FROM docs WHERE coalesce({c}, 'y') = 'y' OR id = 1",
    "SELECT id FROM docs WHERE NOT (coalesce({c}, 'y') = 'y' OR id = 1)",
    "SELECT id FROM docs WHERE coalesce({c}, 'y') = 'y' OR true",
    "SELECT id FROM docs WHERE NOT (CASE WHEN coalesce({c}, 'y') = 'y' THEN id = 1 ELSE id = 2 END)",
    "SELECT id FROM docs WHERE text LIKE {c}",
    "SELECT id FROM docs WHERE regexp_matches(text, {c})",
    "SELECT string_agg(text, {c}) FROM docs",
    "SELECT quantile_cont(id, length({c}) / 10) FROM docs",
    "SELECT date_part(replace({c}, 'a%', 'year'), DATE '2020-01-01' + id::INT) FROM docs",
    "SELECT strftime(DATE '2020-01-01' + id::INT, {c} || 'Y') FROM docs",
    "SELECT json_extract('{{\"a%\": 1}}', {c}) FROM docs",
    "SELECT id FROM docs LIMIT CASE WHEN coalesce({c}, 'y') = 'y' THEN 3 ELSE 2 END",
    "VALUES (CASE WHEN coalesce({c}, 'y') = 'y' THEN 'x' ELSE 'y' END)",
]


@pytest.mark.parametrize("query", UNCAUGHT)
def test_where_duckdb_does_not_catch_the_query_runs(
    con: duckdb.DuckDBPyConnection, engine: EchoEngine, query: str
) -> None:
    found = con.execute(query.format(c="complete('m', 'a%')")).fetchall()
    assert found == con.execute(query.format(c="'a%'")).fetchall()
    assert "a%" in [str(r.prompt) for r in engine.requests]
