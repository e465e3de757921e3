"""`sql` over views that call completions: planned as if the query said what the view says, with the same result."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import pytest

from complete_fn_connectors.duckdb import explain, register, sql
from tests.engines import Counting


@pytest.fixture
def engine() -> Counting:
    return Counting()


@pytest.fixture
def con(engine: Counting, tmp_path: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    with duckdb.connect() as opened:
        opened.execute("CREATE TABLE docs AS SELECT i AS id, 'doc ' || i AS text FROM range(6000) r(i)")
        opened.execute("CREATE TABLE few AS SELECT i AS id FROM range(0, 6000, 300) r(i)")
        register(opened, engine=engine, home=tmp_path / "home", progress=False)
        opened.execute("CREATE VIEW answers AS SELECT id, complete('m', text) AS a FROM docs")
        opened.execute("CREATE VIEW renamed(n, \"An answer\") AS SELECT id, upper(a) FROM answers WHERE a <> 'doc 600'")
        opened.execute("CREATE SCHEMA s")
        opened.execute("CREATE VIEW s.twice AS SELECT complete('m', a || '!') AS b, id, id FROM main.answers")
        yield opened


@pytest.mark.parametrize(
    ("query", "prompts", "submissions"),
    [
        ("SELECT * FROM answers WHERE id % 300 = 7 ORDER BY id", 20, 1),
        ("SELECT v.a, few.id FROM answers v JOIN few USING (id) WHERE few.id > 300 ORDER BY 2", 18, 1),
        ('SELECT "An answer", n FROM Renamed WHERE n % 600 = 0 ORDER BY n', 10, 1),
        ("SELECT x.x, id_1 FROM s.twice x(x) WHERE id < 4 ORDER BY id", 8, 2),
        ("SELECT (SELECT max(a) FROM answers WHERE id < 3), count(*) FROM docs", 3, 1),
        (
            "WITH mine AS (SELECT a FROM answers WHERE id < 5) SELECT complete('m', a || '?') FROM mine ORDER BY 1",
            10,
            2,
        ),
        ("SELECT a FROM answers WHERE id < 2 UNION ALL SELECT text FROM docs WHERE id < 2 ORDER BY 1", 2, 1),
        ("FROM answers WHERE length(a) = 5 AND id < 9 ORDER BY id", 9, 1),
        ("SELECT a FROM answers WHERE id < $most ORDER BY a", 4, 1),
    ],
)
def test_a_view_is_planned_with_the_query(
    con: duckdb.DuckDBPyConnection, engine: Counting, tmp_path: Path, query: str, prompts: int, submissions: int
) -> None:
    parameters = {"most": 4} if "$most" in query else None
    found = sql(con, query, parameters)
    rows = found.fetchall()
    assert (len(engine.requests), len(engine.submissions)) == (prompts, submissions)
    plain = con.sql(query, params=parameters)
    assert (rows, found.columns, found.types) == (plain.fetchall(), plain.columns, plain.types)


def test_explain_shows_the_calls_of_a_view(con: duckdb.DuckDBPyConnection, engine: Counting) -> None:
    shown = str(explain(con, "SELECT b, complete('m', 'on ' || id) FROM s.twice WHERE id < 4"))
    assert "complete('m', \"text\")" in shown
    assert "complete('m', 'on ' || id)" in shown
    assert "after #2, #3" in shown
    assert engine.requests == []


def test_a_copy_and_a_table_from_a_view(con: duckdb.DuckDBPyConnection, engine: Counting, tmp_path: Path) -> None:
    sql(con, f"COPY (SELECT a FROM answers WHERE id < 3000 AND id % 1000 = 0) TO '{tmp_path / 'a.csv'}'")
    assert (tmp_path / "a.csv").read_text().splitlines() == ["a", "doc 0", "doc 1000", "doc 2000"]
    sql(con, "CREATE TABLE kept AS SELECT a FROM answers WHERE id >= 3000 AND id % 1000 = 0")
    assert con.execute("SELECT count(*) FROM kept").fetchall() == [(3,)]
    assert (len(engine.requests), len(engine.submissions)) == (6, 2)


@pytest.mark.parametrize(
    "query",
    [
        "WITH docs AS (SELECT 1 AS id, 'other' AS text) SELECT a FROM answers, docs WHERE answers.id < 2",
        "SELECT a FROM twins WHERE id < 2",
        "SELECT main.answers.a FROM answers WHERE id < 2",
        "SELECT a FROM other.elsewhere WHERE id < 2",
    ],
)
def test_a_view_whose_names_are_in_doubt_is_left_to_duckdb(
    con: duckdb.DuckDBPyConnection, engine: Counting, query: str
) -> None:
    con.execute("CREATE VIEW s.twins AS SELECT 0 AS id, 's' AS a; CREATE VIEW twins AS SELECT id, a FROM answers")
    con.execute("ATTACH ':memory:' AS other; CREATE TABLE other.docs AS SELECT id, text || '' AS text FROM docs")
    con.execute("CREATE VIEW other.elsewhere AS SELECT id, complete('m', text) AS a FROM main.docs")
    assert sorted(sql(con, query).fetchall()) == [("doc 0",), ("doc 1",)]
    assert len(engine.requests) == 2


def test_a_view_out_of_sight_pays_for_nothing(con: duckdb.DuckDBPyConnection, engine: Counting) -> None:
    with pytest.raises(duckdb.CatalogException, match="twice"):
        sql(con, "SELECT b FROM twice WHERE id < 3")
    con.execute("ALTER TABLE docs RENAME COLUMN text TO body")
    with pytest.raises(duckdb.BinderException, match="text"):
        sql(con, "SELECT a FROM answers WHERE id < 3")
    assert engine.requests == []


@pytest.mark.parametrize(
    "query",
    [
        "SELECT * FROM (SELECT (SELECT max(a) FROM answers WHERE id < 3) FROM docs WHERE id < 2)",
        "SELECT (SELECT max(a) FROM answers WHERE id < 3) UNION ALL SELECT 'x'",
        "SELECT COLUMNS(['id']) + (SELECT count(a) FROM answers WHERE id < 3) FROM few",
    ],
)
def test_columns_keep_their_names_everywhere(con: duckdb.DuckDBPyConnection, query: str) -> None:
    found, plain = sql(con, query), con.sql(query)
    assert (found.columns, found.fetchall()) == (plain.columns, plain.fetchall())


@pytest.mark.parametrize(
    ("query", "rows"),
    [
        ("SELECT id + 1 AS rowid FROM (SELECT *, complete('m', text) AS a FROM docs) WHERE rowid = 3", [(3,)]),
        (
            "SELECT (SELECT count(a) FROM (SELECT *, complete('m', text) AS a FROM few JOIN docs USING (id)) v "
            "WHERE docs IS NULL) FROM (SELECT NULL AS docs)",
            [(20,)],
        ),
        (
            "SELECT (SELECT max(n) FROM (SELECT id + 1 AS n FROM (SELECT *, complete('m', text) AS a FROM docs) "
            "WHERE n = 3)) FROM (SELECT 40 AS n)",
            [(3,)],
        ),
    ],
)
def test_a_name_that_no_star_shows_stays_outside(con: duckdb.DuckDBPyConnection, query: str, rows: list[Any]) -> None:
    assert sql(con, query).fetchall() == rows
