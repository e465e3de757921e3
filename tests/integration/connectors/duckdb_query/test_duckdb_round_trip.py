"""A SELECT that is parsed and written again is the same query, in each version of DuckDB."""

from __future__ import annotations

from collections.abc import Iterator

import duckdb
import pytest

from complete_fn_connectors.duckdb_query.call_sites import without_places
from complete_fn_connectors.duckdb_query.planner import expression_text
from complete_fn_connectors.duckdb_query.syntax_tree import RunsPlainly, nodes, parse, put_values_in, to_text

QUERIES = [
    "FROM docs",
    "VALUES (1, 'a'), (-2, 'b')",
    "SELECT 1, -1, 1.50, 1e5, 3000000000, -3000000000, 12345678901234567890, 2147483648, 'it''s', true, NULL, 'ü'",
    "SELECT DATE '2020-01-01', 1::HUGEINT, TRY_CAST('x' AS DECIMAL(10, 2)), INTERVAL 3 DAY, '1'::BLOB, 0.1::DOUBLE",
    "SELECT [1, 2], {'a': 1, 'b': [2]}, MAP {'k': 1}, row(1, 'x'), struct_pack(p := 1, q := 'z'), [1, 2][1]",
    "SELECT {'a': {'b': 7}}.a.b, ['x', 'y'][2:], 'text'[1:2], 'abc' || NULL, 7 // 2, 2 ** 3",
    "SELECT list_transform([1, 2], lambda x: x + 1), list_filter([1, 2], lambda x: x > 1)",
    "SELECT named(b := 2, a := 1), named(3, b := 4)",
    "SELECT count(*), count(DISTINCT k), sum(id) FILTER (k = 1), string_agg(text, ',' ORDER BY id DESC) FROM docs",
    "SELECT k, count(*) AS n FROM docs GROUP BY k HAVING count(*) > 3 ORDER BY k DESC NULLS LAST LIMIT 2 OFFSET 1",
    "SELECT k, id % 2, count(*) FROM docs GROUP BY GROUPING SETS ((k), (k, id % 2), ()) ORDER BY ALL",
    "SELECT k, sum(id) FROM docs GROUP BY ALL ORDER BY ALL",
    "SELECT id, row_number() OVER (PARTITION BY k ORDER BY id) FROM docs QUALIFY row_number() OVER (ORDER BY id) < 4",
    "SELECT id, lag(id, 2, -1) OVER w, sum(id) OVER (w ROWS BETWEEN 1 PRECEDING AND CURRENT ROW) FROM docs "
    "WINDOW w AS (ORDER BY id)",
    "SELECT first_value(text IGNORE NULLS) OVER (ORDER BY id), max(id) FILTER (k = 2) OVER () FROM docs",
    "SELECT DISTINCT k FROM docs ORDER BY k",
    "SELECT DISTINCT ON (k) k, id FROM docs ORDER BY k, id",
    "SELECT id FROM docs ORDER BY id LIMIT 30%",
    "SELECT id FROM docs WHERE k BETWEEN 1 AND 2 AND NOT (id = 3 OR text LIKE '%7') AND text NOT IN ('doc 1', 'doc 2')",
    "SELECT id FROM docs WHERE text ILIKE 'DOC%' AND text SIMILAR TO '.*1' AND k IS NOT NULL AND id IS DISTINCT FROM 3",
    "SELECT CASE k WHEN 1 THEN 'one' WHEN 2 THEN 'two' END, CASE WHEN k > 2 THEN 1 ELSE 0 END, "
    "coalesce(NULL, k) FROM docs",
    "SELECT id FROM docs WHERE id IN (SELECT id FROM tags) AND EXISTS (SELECT 1 FROM tags t WHERE t.k = docs.k) "
    "AND id >= (SELECT min(id) FROM tags) AND id = ANY (SELECT id FROM tags)",
    "SELECT * EXCLUDE (k) REPLACE (upper(text) AS text), docs.id AS again FROM docs",
    "SELECT COLUMNS('i.*') FROM docs",
    "SELECT d.*, t.name FROM docs d JOIN tags t USING (id) LEFT JOIN tags u ON u.id = d.k AND u.k > 1 ORDER BY ALL",
    "SELECT d.id, t.id FROM docs d, tags t WHERE d.id = t.id ORDER BY 1",
    "SELECT d.id FROM docs d SEMI JOIN tags t USING (id) ORDER BY 1",
    "SELECT d.id FROM docs d ANTI JOIN tags t ON d.id = t.id + 2 ORDER BY 1",
    "SELECT count(*) FROM docs d FULL JOIN tags t ON d.id = t.k CROSS JOIN range(3) r(i)",
    "SELECT d.id, t.id FROM docs d ASOF JOIN tags t ON d.id >= t.id ORDER BY 1",
    "SELECT d.id, t.id FROM docs d POSITIONAL JOIN tags t",
    "SELECT v.a, v.b FROM (VALUES (1, 'x'), (2, 'y')) AS v(a, b), LATERAL (SELECT v.a + 1) AS w(c) ORDER BY ALL",
    "SELECT unnest([1, 2]), unnest({'a': 1, 'b': 2})",
    "SELECT i FROM generate_series(1, 4) g(i) WHERE i <> 2",
    "SELECT * FROM (SELECT id AS n, text FROM docs WHERE id < 3) s(number, words)",
    "WITH c AS (SELECT k, id FROM docs), e(x) AS (SELECT id FROM c WHERE k = 1) SELECT x FROM e ORDER BY x",
    "WITH c AS MATERIALIZED (SELECT id FROM docs) SELECT count(*) FROM c, c AS d WHERE c.id = d.id",
    "WITH c AS NOT MATERIALIZED (SELECT id FROM docs) SELECT count(*) FROM c UNION ALL SELECT 1 FROM c "
    "ORDER BY 1 LIMIT 4",
    "WITH c AS MATERIALIZED (SELECT 1 AS a), d AS MATERIALIZED (SELECT a + 1 AS b FROM c) "
    "(SELECT a FROM c) UNION FROM d",
    "WITH RECURSIVE r AS (SELECT 1 AS x UNION ALL SELECT x + 1 FROM r WHERE x < 5) SELECT sum(x) FROM r",
    "SELECT id FROM docs WHERE id < 3 UNION SELECT id FROM tags WHERE id < 5 EXCEPT SELECT 2 INTERSECT "
    "SELECT 2 ORDER BY 1",
    "(SELECT 1 AS a UNION ALL SELECT 2) UNION ALL (SELECT 3 ORDER BY 1 LIMIT 1) ORDER BY a DESC",
    "SELECT 1 AS a UNION ALL BY NAME SELECT 2 AS b",
    "SELECT main.docs.id, docs.text FROM main.docs WHERE memory.main.docs.id = 4",
    'SELECT "weird name", "SELECT" FROM "odd table"',
    "SELECT text COLLATE NOCASE = 'DOC 1', 'a' < 'B' COLLATE NOCASE FROM docs WHERE id = 1",
    "SELECT (SELECT max(id) FROM docs d WHERE d.k = o.k), o.id FROM docs o WHERE id < 4 ORDER BY 2",
    "SELECT extract(year FROM DATE '2020-05-06'), position('b' IN 'abc'), substring('abc' FROM 2), trim('  x ')",
    "SELECT id FROM docs WHERE (k, id) IN ((1, 1), (2, 7)) ORDER BY 1",
    "PIVOT docs ON k IN (1, 2) USING count(*)",
    "UNPIVOT (SELECT 1 AS a, 2 AS b) ON a, b",
    "SELECT quantile_cont(id, 0.5), list(text ORDER BY id)[:2], arg_max(text, id) FROM docs",
    "SELECT try(1 / 0), if(k = 1, 'a', 'b'), greatest(id, k) FROM docs WHERE id < 3",
]


@pytest.fixture(scope="module")
def con() -> Iterator[duckdb.DuckDBPyConnection]:
    with duckdb.connect() as opened:
        opened.execute("CREATE TABLE docs AS SELECT i AS id, 'doc ' || i AS text, i % 5 AS k FROM range(20) r(i)")
        opened.execute("CREATE TABLE tags AS SELECT i AS id, 'tag ' || i AS name, i % 7 AS k FROM range(0, 20, 3) r(i)")
        opened.execute('CREATE TABLE "odd table" AS SELECT 1 AS "weird name", 2 AS "SELECT"')
        opened.execute("CREATE MACRO named(a, b := 5) AS a * 10 + b")
        yield opened


@pytest.mark.parametrize("query", QUERIES)
def test_what_is_parsed_and_written_has_the_same_rows(con: duckdb.DuckDBPyConnection, query: str) -> None:
    expected = con.execute(query).fetchall()
    try:
        tree = parse(con, query)
    except RunsPlainly:
        assert "PIVOT" in query or ("MATERIALIZED" in query and duckdb.__version__.startswith("1.5."))
        return
    text = to_text(con, tree)
    found = con.execute(text).fetchall()
    assert sorted(found, key=repr) == sorted(expected, key=repr)
    again = con.execute(to_text(con, parse(con, text))).fetchall()
    assert sorted(again, key=repr) == sorted(expected, key=repr)


@pytest.mark.parametrize("query", [query for query in QUERIES if "MATERIALIZED" not in query and "PIVOT" not in query])
def test_a_tree_has_the_fields_of_the_newest_shape(con: duckdb.DuckDBPyConnection, query: str) -> None:
    for node in nodes(parse(con, query)):
        if node.get("class") == "FUNCTION":
            assert "children" not in node
            assert node["qualified_name"]["path"][-1] == node["function_name"]
            assert all(set(argument) == {"name", "expression"} for argument in node["arguments"])
        if node.get("type") == "BASE_TABLE":
            assert node["qualified_name"]["path"][-1] == node["table_name"]
        if "materialized" in node:
            assert node["query_node"]["type"].endswith("_NODE")
        assert node.get("type") != "CTE_NODE"


def test_names_of_arguments_are_kept(con: duckdb.DuckDBPyConnection) -> None:
    call = parse(con, "SELECT named(3, b := 4)")["node"]["select_list"][0]
    assert [argument["name"] for argument in call["arguments"]] == ["", "b"]
    moved = {**call["arguments"][1]["expression"], "alias": "other"}
    changed = {**call, "arguments": [call["arguments"][0], {"name": "b", "expression": moved}]}
    assert con.execute(f"SELECT {expression_text(con, changed)}").fetchall() == [(34,)]


def test_literals_are_read_and_written_alike(con: duckdb.DuckDBPyConnection) -> None:
    tree = parse(con, "SELECT 'a', 7, 3000000000, ?")
    assert [item.get("literal") for item in tree["node"]["select_list"]] == [
        {"kind": "STRING", "text": "a"},
        {"kind": "INTEGER", "text": "7"},
        {"kind": "INTEGER", "text": "3000000000"},
        None,
    ]
    valued = put_values_in(con, tree, [True])
    assert con.execute(to_text(con, valued)).fetchall() == [("a", 7, 3000000000, True)]
    assert without_places(parse(con, to_text(con, valued))["node"]) == without_places(valued["node"])


def test_materialized_is_never_lost(con: duckdb.DuckDBPyConnection) -> None:
    for word in ("MATERIALIZED", "not materialized"):
        query = f"WITH c AS {word} (SELECT id FROM docs) SELECT count(*) FROM c"
        if duckdb.__version__.startswith("1.5."):
            with pytest.raises(RunsPlainly, match="does not serialise MATERIALIZED"):
                parse(con, query)
        else:
            assert word.upper() in to_text(con, parse(con, query))
    assert parse(con, "SELECT 'MATERIALIZED' AS a -- MATERIALIZED\n")
