"""`sql` where it went astray before: against the plain run, its rows, types, errors and what is paid."""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import duckdb
import pytest

from complete_fn import Completion, CompletionRequest, EchoEngine, Usage
from complete_fn_connectors.duckdb import estimate, explain, register, sql

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


FAILING = [
    "SELECT coalesce(complete('m', 'num' || id), 'none')::INT FROM docs WHERE id < 3",
    "SELECT CASE WHEN complete('m', text) IS NULL THEN text::INT ELSE 1 END FROM docs WHERE id < 3",
    "SELECT 2147483647::INT + CASE WHEN complete('m', text) IS NULL THEN 1::INT ELSE 0::INT END FROM docs WHERE id < 3",
    "SELECT regexp_matches(text, coalesce(complete('m', text), '[')) FROM docs WHERE id < 3",
    "SELECT ('{' || CASE WHEN complete('m', text) IS NULL THEN '' ELSE '}' END)::JSON FROM docs WHERE id < 3",
    "SELECT text LIKE 'y' ESCAPE CASE WHEN complete('m', text) IS NULL THEN 'xx' ELSE 'x' END FROM docs WHERE id < 3",
    "SELECT CASE WHEN complete('m', text) IS NULL THEN complete('m', text, {'nope': 1}) END FROM docs WHERE id < 3",
    "SELECT id FROM docs WHERE id < 3 AND CASE WHEN complete('m', text) IS NULL THEN k = 'many' ELSE true END",
    "SELECT min(id, CASE WHEN complete('m', 'x') IS NULL THEN 0 ELSE 1 END) FROM docs WHERE id < 3",
]


@pytest.mark.parametrize("query", FAILING)
@pytest.mark.parametrize("look", [None, explain, estimate])
def test_a_placeholder_does_not_abort_a_transaction(query: str, look: Any) -> None:
    with connection() as (con, _):
        expected = con.execute(query).fetchall()
    with connection() as (con, engine):
        con.execute("BEGIN")
        con.execute("INSERT INTO tgt VALUES (5, 'uncommitted')")
        if look is not None:
            look(con, query)
            assert engine.requests == []
        assert sql(con, query).fetchall() == expected
        con.execute("COMMIT")
        assert con.execute("SELECT a FROM tgt").fetchall() == [("uncommitted",)]


def test_text_that_a_completion_spares_does_not_abort_a_transaction() -> None:
    query = "SELECT text::INT FROM docs WHERE id < 5 AND coalesce(complete('m', text), 'y') = 'y'"
    plain, planned = both(query, before=["BEGIN"])
    assert (planned.rows, planned.error, planned.aborted) == (plain.rows, plain.error, plain.aborted)


TOTAL = [
    "SELECT id, complete('m', text, {'max_tokens': 5}) FROM docs WHERE id < 900 AND text LIKE '%7' AND id >= '3'",
    "SELECT coalesce(lower(complete('m', text)), 'none') || id::VARCHAR FROM docs WHERE NOT (k = 1 OR text IS NULL)",
    "SELECT k, count(*), max(complete('m', text)) AS a FROM docs GROUP BY k ORDER BY k LIMIT 3",
    "WITH c AS (SELECT complete('m', text) AS a, k::HUGEINT AS k FROM docs) SELECT a FROM c JOIN tags USING (k)",
    "SELECT CASE WHEN complete('m', text) = 'x' THEN upper(text) END, TRY_CAST(text AS INT) FROM docs WHERE id < 9",
    "SELECT complete_details('m', prompt('{t}', {'t': text})).value FROM docs WHERE id IN (SELECT id FROM tags)",
]


@pytest.mark.parametrize("query", TOTAL)
def test_what_cannot_fail_is_planned_inside_a_transaction(query: str) -> None:
    with connection() as (con, _):
        con.execute("BEGIN")
        assert explain(con, query).plainly is None
        con.execute("ROLLBACK")
    plain, planned = both(query, before=["BEGIN"])
    assert sorted(planned.rows, key=repr) == sorted(plain.rows, key=repr)
    assert not (planned.paid or Counter()) - (plain.paid or Counter())


def test_a_fault_inside_a_call_is_told_by_the_plain_run() -> None:
    query = "SELECT complete('m', text), complete('m', text, {'nope': 1}) FROM docs WHERE id < 3"
    with connection() as (con, _):
        assert "Unknown option 'nope'" in str(explain(con, query).plainly)
        assert "Unknown option 'nope'" in str(estimate(con, query).plainly)
    plain, planned = both(query)
    assert (planned.error, planned.paid) == (plain.error, plain.paid)


@pytest.mark.parametrize(
    "query",
    [
        "SELECT k, count(*) FROM docs WHERE id < 2900 AND complete('m', text) <> 'x' GROUP BY k "
        "HAVING complete('m', 'k' || k) = 'k2'",
        "SELECT id, k FROM docs WHERE id < 2900 AND complete('m', text) <> 'x' "
        "QUALIFY row_number() OVER (PARTITION BY k ORDER BY id) < 3 AND complete('m', 'k' || k) = 'k2'",
        "SELECT complete('m', text) AS a, id FROM docs WHERE complete('m', 'k' || k) = 'k2' AND a <> 'x'",
        "SELECT complete('m', 'b' || text) AS a FROM docs WHERE complete('m', text) = 'doc 13' AND a <> 'zz'",
        "SELECT id FROM docs WHERE id < 2900 AND complete('m', text) = 'a' AND NOT (complete('m', text) = 'a')",
    ],
)
def test_guards_do_not_turn_round_what_duckdb_pushes_into_the_filter(query: str) -> None:
    plain, planned = both(query)
    assert sorted(planned.rows) == sorted(plain.rows)
    assert planned.prompts <= plain.prompts


def test_ordinary_queries_keep_their_guards() -> None:
    for query in (
        "SELECT k, count(*) FROM docs WHERE id < 2900 AND complete('m', text) <> 'x' GROUP BY k HAVING count(*) > 1",
        "SELECT id FROM docs WHERE complete('m', text) <> 'x' AND id % 7 = 1 AND complete('n', text) LIKE '%1'",
    ):
        with connection() as (con, _):
            assert all(site.guards for site in explain(con, query).sites), query


ENDLESS = "(SELECT count(*) FROM range(3000000) x(i), range(400) y(j) WHERE (i * j) % 7 = 3)"


@pytest.mark.parametrize(
    "query",
    [
        f"WITH c AS {ENDLESS} SELECT complete('m', text) FROM docs, c WHERE id < 2",
        f"SELECT id FROM docs WHERE id < 2 AND complete('m', text) <> 'x' AND {ENDLESS} > 3",
    ],
)
@pytest.mark.parametrize("run", [sql, explain, estimate])
def test_an_interrupted_query_ends_unpaid(query: str, run: Any) -> None:
    with connection() as (con, engine):
        over = threading.Event()

        def interrupt() -> None:
            while not over.wait(0.7):  # one that comes between two statements has no effect
                con.interrupt()

        interrupting = threading.Thread(target=interrupt)
        interrupting.start()
        began = time.monotonic()
        try:
            with pytest.raises(duckdb.InterruptException):
                run(con, query)
        finally:
            over.set()
            interrupting.join()
        assert time.monotonic() - began < 20
        assert engine.requests == []
        assert sql(con, "SELECT complete('m', 'still here')").fetchall() == [("still here",)]


@pytest.mark.parametrize(
    "query",
    [
        "SELECT id, 'nan'::DOUBLE AS v FROM docs WHERE id < 30 AND complete('m', text) <> 'x'",
        "SELECT id, {}::DOUBLE AS v FROM docs WHERE id < 30 AND complete('m', text) <> 'x' AND {}::FLOAT > 1".replace(
            "{}", "'-inf'"
        ),
        "CREATE TABLE numbers AS SELECT complete('m', 'x') AS a, 'nan'::DOUBLE AS v",
    ],
)
def test_a_constant_that_json_has_not_is_read(query: str) -> None:
    plain, planned = both(query)
    assert repr((planned.rows, planned.types, planned.error)) == repr((plain.rows, plain.types, plain.error))
    assert planned.error is None


def is_fit(expression: str) -> bool:
    """Whether this DuckDB makes tables of a type, and Python's and Arrow's values."""
    try:
        con = duckdb.connect()
        con.execute(f"CREATE TABLE t AS SELECT {expression} AS v; FROM t").fetchall()
        con.sql("FROM t").to_arrow_table()
    except (duckdb.NotImplementedException, OSError):
        return False
    return True


VARIANTS = "1::VARIANT AS v, [1::VARIANT] AS vs, " if is_fit("1::VARIANT") else ""  # since 2.0
VALUES = f"""['101'::BIT] AS bits, {{'a': '101'::BIT}} AS s, INTERVAL '9999999 hours' AS i, ['10:00:00+01'::TIMETZ]
AS z, {VARIANTS}340282366920938463463374607431768211455::UHUGEINT AS u, 'x'::ENUM('x', 'y') AS e,
123456789012345678901234567890::BIGNUM AS n, MAP {{'k': '1'::BIT}} AS m, 1 AS a, 2 AS a, 3 AS a_1, 4 AS A"""


@pytest.mark.parametrize(
    "query",
    [
        f"SELECT {VALUES}",
        f"SELECT complete('m', text) AS answer, {VALUES} FROM docs WHERE id < 3",
        f"SELECT {VALUES}, nextval('s') AS next FROM docs LIMIT 3",
        "SELECT nextval('s') AS n, k, '101'::BIT AS b FROM docs LIMIT 3",
        "SELECT complete('m', 'x') AS a, '101'::BIT AS b; -- done",
        "-- first\nSELECT complete('m', 'x;') AS a, '101'::BIT AS b /* ; */ ; ",
        "FROM docs SELECT id ORDER BY id DESC LIMIT 5",
        "EXPLAIN SELECT ['101'::BIT]",
        "SHOW TABLES",
        "VALUES ('101'::BIT)",
    ],
)
def test_values_types_and_names_are_duckdbs_own(query: str) -> None:
    plain, planned = both(query)
    assert (planned.rows, planned.types, planned.error) == (plain.rows, plain.types, plain.error)
    assert planned.error is None
    assert planned.prompts == plain.prompts


@pytest.mark.parametrize("caps", [{}, {"max_total_tokens": 100000}])
def test_a_relation_keeps_its_rows_and_leaves_nothing_behind(caps: dict[str, Any]) -> None:
    values = ["m", "!", 3, [b"x"], Decimal("1.50"), None]
    for query, given in (
        ("SELECT complete(?, text || ?) AS a, ['1'::BIT] AS b, ?, ?, ?, ?, nextval('s') FROM docs LIMIT 4", values),
        ("SELECT complete($M, text) AS a, ['1'::BIT] AS b, $n AS n FROM docs WHERE id < 4", {"M": "m", "n": 3}),
        ("SET threads = 1; SELECT complete('m', text), ['1'::BIT] FROM docs WHERE id < ?", [3]),
        ("PIVOT (SELECT k, ['1'::BIT] AS b FROM docs) ON k USING first(b)", None),
        ("INSERT INTO tgt SELECT id, complete('m', text) FROM docs WHERE id < 9 RETURNING ['1'::BIT], a", None),
    ):
        with connection() as (con, _):
            expected = con.execute(query, given or [])
            described, rows = expected.description, expected.fetchall()
        with connection() as (con, engine):
            relation = sql(con, query, given, **caps)
            assert [(d[0], str(d[1])) for d in relation.description] == [(d[0], str(d[1])) for d in described]
            assert relation.fetchall() == rows
            paid = len(engine.requests)
            if isinstance(relation, duckdb.DuckDBPyRelation):
                con.execute("DELETE FROM docs")
                assert relation.fetchall() == rows
            assert len(engine.requests) == paid
            assert con.execute("FROM duckdb_prepared_statements()").fetchall() == []
            assert con.execute("FROM duckdb_variables()").fetchall() == []


@pytest.mark.parametrize(
    ("query", "given"),
    [
        ("SELECT id FROM docs WHERE id < ?", []),
        ("SELECT id FROM docs WHERE id < ?", [1, 2]),
        ("SELECT id FROM docs WHERE id < ?", {"n": 1}),
        ("SELECT id FROM docs", [1]),
        ("SELECT id FROM docs d JOIN tags USING (k)", []),
        ("SELECT complete('m', nope) FROM docs", []),
    ],
)
def test_what_cannot_be_prepared_is_told_in_the_plain_words(query: str, given: Any) -> None:
    told = []
    for run in (lambda c: c.execute(query, given), lambda c: sql(c, query, given)):
        with connection() as (con, _), pytest.raises(duckdb.Error) as caught:
            run(con)
        told.append((type(caught.value), str(caught.value)))
    assert told[0] == told[1]


def test_types_that_python_needs_a_library_for_are_planned() -> None:
    made = f"CREATE TABLE made AS SELECT id, text, TIMESTAMPTZ '2020-01-01 00:00:00+00' AS at, {VALUES}"
    query = "SELECT *, complete('m', text) AS answer FROM made "
    with connection([made.split(", 2 AS a")[0] + " FROM docs"]) as (con, engine):
        assert [s.prompts for s in explain(con, query + "WHERE id % 300 = 7").sites] == [10]
        assert [p.distinct for p in estimate(con, query + "WHERE id % 300 = 7").parts] == [10]
        assert sql(con, query + "WHERE id % 300 = 7").project("answer").fetchall()[0] == ("doc 7",)
        assert [p.distinct for p in estimate(con, query + "WHERE id % 300 = ?", [8]).parts] == [10]
        assert len(engine.requests) == 10


def test_a_type_that_arrow_has_not_is_no_obstacle() -> None:
    plain, planned = both("SELECT complete('m', text) AS a, 1::VARIANT AS v FROM docs WHERE id < 3")
    assert (planned.rows, planned.types, planned.error) == (plain.rows, plain.types, plain.error)
    assert planned.paid == plain.paid


def test_a_round_that_fails_leaves_no_result_open() -> None:
    query = "SELECT id, coalesce(complete('m', 'num' || id), 'none')::INT AS n FROM docs"
    with connection() as (con, engine):
        assert "Could not convert string 'none'" in str(explain(con, query))
        assert "Could not convert string 'none'" in str(estimate(con, query))
        assert engine.requests == []
        assert len(sql(con, query).fetchall()) == 3000


def test_queries_at_the_same_time_pay_once_for_what_is_not_kept() -> None:
    with connection() as (con, engine):

        def ask(number: int) -> None:
            cursor = con.cursor()
            for i in range(2):
                prompt = f"'w{number}-{i}-' || j"
                assert (
                    len(sql(cursor, f"SELECT complete('m', {prompt}, {{'cache': 'off'}}) FROM range(4000) x(j)"))
                    == 4000
                )

        with ThreadPoolExecutor(3) as pool:
            list(pool.map(ask, range(3)))
        assert len(engine.requests) == len({str(r.prompt) for r in engine.requests}) == 24000


@pytest.mark.parametrize("macro", ["MACRO complete(a, b)", "TEMP MACRO Complete(a, b)", "MACRO main.complete(a, b)"])
def test_a_macro_of_the_same_name_is_not_a_call(macro: str) -> None:
    setup = [f"CREATE {macro} AS 'mine ' || b"]
    plain, planned = both("SELECT complete('m', text) FROM docs WHERE id < 3", before=setup)
    assert (planned.rows, planned.prompts, planned.error) == (plain.rows, plain.prompts, plain.error)
    plain, planned = both("SELECT complete('m', text), try_complete('m', text) FROM docs WHERE id < 3", before=setup)
    assert (planned.rows, planned.paid) == (plain.rows, plain.paid)


def test_a_copy_to_a_folder_that_is_not_there_pays_as_the_plain_run(tmp_path: Path) -> None:
    there = tmp_path / "it's here"
    there.mkdir()
    plain, planned = both("COPY (SELECT complete('m', text) FROM docs) TO '/nonexistent/dir/x.csv' (HEADER)")
    assert (planned.error, planned.prompts) == (plain.error, plain.prompts)
    for ending in ("", " (FORMAT csv)", "; -- done", " -- done"):
        target = str(there / "x.csv").replace("'", "''")
        with connection() as (con, _):
            query = f"COPY (SELECT complete('m', text) FROM docs WHERE id % 300 = 7) TO '{target}'{ending}"
            assert explain(con, query).plainly is None
            assert sql(con, query).fetchall() == [(10,)]
