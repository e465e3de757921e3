"""`sql` and `explain`: what a whole query asks, in how many submissions, and that nothing else about it changes."""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import duckdb
import polars as pl
import pytest

from complete_fn import Completion, CompletionRequest, CompletionWarning, EchoEngine
from complete_fn.errors import InputError, InvalidOptionError
from complete_fn_connectors.duckdb import explain, register, registration_of, sql
from tests.engines import Counting

DOCS = "CREATE TABLE docs AS SELECT i AS id, 'doc ' || i AS text, i % 10 AS k FROM range(6000) r(i)"
GOLDEN = Path(__file__).parents[3] / "golden"


@pytest.fixture
def engine() -> Counting:
    return Counting()


@pytest.fixture
def con(engine: Counting, tmp_path: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    with duckdb.connect() as opened:
        opened.execute(DOCS)
        register(opened, engine=engine, home=tmp_path / "home", progress=False)
        yield opened


def first(relation: Any) -> list[Any]:
    return [row[0] for row in relation.fetchall()]


def test_a_selective_filter_is_one_submission(con: duckdb.DuckDBPyConnection, engine: Counting) -> None:
    query = "SELECT complete('m', text) FROM docs WHERE id % 300 = 7"
    assert sorted(first(sql(con, query))) == sorted(f"doc {i}" for i in range(7, 6000, 300))
    assert engine.submissions == [20]


def test_dependent_calls_are_one_submission_each(con: duckdb.DuckDBPyConnection, engine: Counting) -> None:
    query = "WITH c AS (SELECT complete('m', text) AS a FROM docs) SELECT complete('m', 'on ' || a) FROM c"
    assert len(first(sql(con, query))) == 6000
    assert engine.submissions == [6000, 6000]
    assert first(sql(con, "SELECT complete('m', complete('m', 'nested ' || k)) FROM docs WHERE id < 2")) != []
    assert engine.submissions[2:] == [2]


def test_a_cheap_condition_decides_first(con: duckdb.DuckDBPyConnection, engine: Counting) -> None:
    query = "SELECT id FROM docs WHERE complete('m', text) = 'doc 13' AND regexp_matches(text, '13$')"
    assert first(sql(con, query)) == [13]
    assert len(engine.requests) == 60
    engine.requests.clear()
    either = "SELECT count(*) FROM docs WHERE complete('m', 'or ' || text) = 'or doc 13' OR id <> 13"
    assert first(sql(con, either)) == [6000]
    assert engine.asked() == ["or doc 13"]


def test_coalesce_asks_the_second_model_only_where_the_first_has_nothing(
    con: duckdb.DuckDBPyConnection, engine: Counting
) -> None:
    query = "SELECT coalesce(complete('cheap', p), complete('strong', 'again ' || id)) FROM (SELECT id, "
    query += "CASE WHEN k = 3 THEN 'bad ' ELSE '' END || text AS p FROM docs WHERE id < 50)"
    with pytest.warns(CompletionWarning, match="5 blocked"):
        found = first(sql(con, query))
    assert sorted(found)[:5] == ["again 13", "again 23", "again 3", "again 33", "again 43"]
    assert engine.submissions == [50, 5]
    assert {r.model for r in engine.requests} == {"cheap", "strong"}


def test_a_limit_asks_no_further_than_it_must(con: duckdb.DuckDBPyConnection, engine: Counting, tmp_path: Path) -> None:
    query = "SELECT id FROM docs WHERE complete('m', text) LIKE 'doc 1%' LIMIT 3"
    with duckdb.connect() as other, register(other, engine=(plain := Counting()), home=tmp_path / "plain"):
        other.execute(DOCS)
        assert len(other.execute(query).fetchall()) == 3
    assert len(sql(con, query).fetchall()) == 3
    assert len(engine.requests) == len(plain.requests)  # 2,048, one call; DuckDB 1.4 reads all rows
    engine.requests.clear()
    assert len(sql(con, "SELECT complete('m', 'top ' || text) FROM docs ORDER BY id LIMIT 5").fetchall()) == 5
    assert len(engine.requests) in (5, 2048)


def test_the_rows_are_kept_and_typed_as_duckdb_has_them(con: duckdb.DuckDBPyConnection, engine: Counting) -> None:
    query = "SELECT complete('m', 'x') AS a, 1 AS a, 3::HUGEINT AS h, '101'::BIT AS b, '10:00:00+01'::TIMETZ AS z, "
    query += "'x'::ENUM('x', 'y') AS e, MAP {'k': 1} AS m"
    relation = sql(con, query)
    plain = con.sql(query)
    assert relation.columns == plain.columns
    assert list(map(str, relation.types)) == list(map(str, plain.types))
    assert relation.fetchall() == relation.fetchall() == plain.fetchall()
    assert repr(relation)
    assert len(engine.requests) == 1


def test_statements_around_a_select_are_planned_and_run_once(
    con: duckdb.DuckDBPyConnection, engine: Counting, tmp_path: Path
) -> None:
    sparse = "SELECT id, complete('m', text) AS a FROM docs WHERE id % 600 = 1"
    assert sql(con, f"CREATE TABLE made AS {sparse}") is con
    assert engine.submissions == [10]
    assert (
        sql(con, f"INSERT INTO made {sparse} RETURNING a").fetchall()
        == con.execute(sparse.replace("id,", "")).fetchall()
    )
    assert sql(con, f"INSERT INTO made {sparse.replace('text', chr(39) + 'ü ' + chr(39) + ' || text')}").fetchall() == [
        (10,)
    ]
    target = tmp_path / "made.csv"
    assert sql(con, f"COPY ({sparse}) TO '{target}'").fetchall() == [(10,)]
    assert len(target.read_text().splitlines()) == 11
    assert con.execute("SELECT count(*) FROM made").fetchall() == [(30,)]
    assert engine.submissions == [10, 10]
    with pytest.raises(duckdb.CatalogException, match="already exists"):
        sql(con, "CREATE TABLE made AS SELECT complete('m', 'never ' || text) AS a FROM docs")
    assert not any("never" in prompt for prompt in engine.asked())


def test_parameters_and_frames_of_the_caller(con: duckdb.DuckDBPyConnection, engine: Counting) -> None:
    query = "SELECT complete(?, text || ?) FROM docs WHERE id % ? = 5 AND k = 5"
    assert len(first(sql(con, query, ["m", "!", 1000]))) == 6
    assert engine.submissions == [6]
    named = "SELECT complete('m', text || $mark) FROM docs WHERE id = $id"
    assert first(sql(con, named, {"id": 4, "mark": "?"})) == ["doc 4?"]
    frame = pl.DataFrame({"t": ["a", "b"]})
    assert first(sql(con, "SELECT complete('m', t) FROM frame")) == list(frame["t"])


def test_it_works_inside_an_open_transaction_and_in_a_cursor(con: duckdb.DuckDBPyConnection, engine: Counting) -> None:
    con.execute("BEGIN")
    con.execute("INSERT INTO docs VALUES (6001, 'uncommitted', 1)")
    assert first(sql(con, "SELECT complete('m', text) FROM docs WHERE id > 6000")) == ["uncommitted"]
    with pytest.raises(duckdb.BinderException, match="nope"):
        sql(con.cursor(), "SELECT nope FROM docs")
    con.execute("ROLLBACK")
    assert first(sql(con.cursor(), "SELECT complete('m', text) FROM docs WHERE id > 5998")) == ["doc 5999"]


@pytest.mark.parametrize(
    "query",
    [
        "SELECT complete('m', 'r' || random()) FROM range(3)",
        "SELECT complete('m', text, {'temperature': 0.5}) FROM docs WHERE id < 3",
        "SELECT list_transform([text], lambda x: complete('m', x)) FROM docs WHERE id < 3",
        "WITH RECURSIVE r AS (SELECT 'a' x UNION ALL SELECT complete('m', x || 'a') FROM r WHERE length(x) < 3) FROM r",
        "SELECT answer(text) FROM docs WHERE id < 3",
    ],
)
def test_what_is_in_doubt_runs_plainly(con: duckdb.DuckDBPyConnection, engine: Counting, query: str) -> None:
    con.execute("CREATE MACRO answer(t) AS complete('m', t)")
    assert len(sql(con, query).fetchall()) == 3
    assert "plainly" in str(explain(con, query)) or "AS IT IS" in str(explain(con, query))


def test_over_a_join_each_table_has_its_own_guards(con: duckdb.DuckDBPyConnection, engine: Counting) -> None:
    query = "SELECT d.id FROM docs d JOIN docs e USING (id) WHERE complete('m', d.text) <> 'x' AND length(d.text) = 5"
    assert len(first(sql(con, query))) == 10
    assert len(engine.requests) == 10


def test_a_guard_that_fails_is_taken_back(con: duckdb.DuckDBPyConnection, engine: Counting) -> None:
    con.execute("CREATE TABLE mixed AS SELECT * FROM (VALUES ('7'), ('x')) v(t)")
    query = "SELECT t FROM mixed WHERE CASE complete('m', t) WHEN '7' THEN true ELSE false END AND t::INT = 7"
    try:
        plain = con.execute(query).fetchall()
    except duckdb.ConversionException:
        with pytest.raises(duckdb.ConversionException):
            sql(con, query)
    else:
        assert sql(con, query).fetchall() == plain
    assert first(sql(con, "SELECT complete('m', 'still here')")) == ["still here"]


def test_cortex_names_are_planned_too(engine: Counting, tmp_path: Path) -> None:
    with duckdb.connect() as con, register(con, engine=engine, home=tmp_path, cortex=True):
        con.execute("CREATE TABLE docs AS SELECT i AS id, 'doc ' || i AS text FROM range(6000) r(i)")
        query = "SELECT SNOWFLAKE.CORTEX.COMPLETE('m', text) AS a, AI_COMPLETE('m', 'on ' || text) AS b FROM docs"
        assert sorted(sql(con, f"{query} WHERE id % 600 = 3").fetchall())[0] == ("doc 1203", "on doc 1203")
        assert engine.submissions == [20]


def test_planning_pays_nothing(con: duckdb.DuckDBPyConnection, engine: Counting) -> None:
    query = "SELECT complete('m', text) FROM docs WHERE complete('m', 'const') = 'const'"
    explain(con, query)
    assert engine.requests == []
    query = "SELECT complete('m', text) FROM docs WHERE complete('m', text) <> 'const'"
    sql(con, f"EXPLAIN {query}")
    sql(con, f"DESCRIBE {query}")
    sql(con, f"PREPARE later AS {query}")
    assert engine.requests == []
    assert len(sql(con, "EXECUTE later").fetchall()) == 6000


def test_nothing_stays_in_the_database(tmp_path: Path) -> None:
    path = tmp_path / "kept.duckdb"
    with duckdb.connect(str(path)) as con, register(con, engine=EchoEngine(), home=tmp_path / "home"):
        assert first(sql(con, "SELECT complete('m', 'x')")) == ["x"]
    with duckdb.connect(str(path)) as con:
        found = con.execute(
            "SELECT function_name FROM duckdb_functions() WHERE function_name LIKE 'complete%'"
        ).fetchall()
        assert found == []
        assert con.execute("SELECT count(*) FROM duckdb_tables()").fetchall() == [(0,)]


def test_the_budget_holds_and_failed_rows_are_asked_once(tmp_path: Path) -> None:
    engine = Counting()
    with duckdb.connect() as con, register(con, engine=engine, home=tmp_path, max_cost=Decimal("0")) as registration:
        with pytest.warns(CompletionWarning, match="budget_exceeded"):
            assert first(sql(con, "SELECT complete('demo-llama', 'a b c')")) == [None]
        assert engine.requests == []
        assert "budget_exceeded" in registration.summary()


@pytest.mark.parametrize("cap", [{"max_total_tokens": 1800}, {"max_cost": "0.000018"}])
def test_a_querys_own_cap_holds_for_it_alone(
    cap: dict[str, Any], con: duckdb.DuckDBPyConnection, engine: Counting
) -> None:
    query = (
        "SELECT complete('demo-llama', repeat(text || ' ', 50), {'max_tokens': 2}) FROM docs WHERE id BETWEEN ? AND ?"
    )
    with pytest.warns(CompletionWarning, match=f"The query's {next(iter(cap))}"):
        answers = first(sql(con, query, [100, 129], **cap))
    answered = [answer for answer in answers if answer is not None]
    assert 0 < len(answered) == len(engine.requests) < 30
    assert 102 * len(answered) <= 1800
    again = first(sql(con, query, [100, 129], **cap))  # what is known is free
    assert set(answered) < set(again)
    assert None not in first(sql(con, query, [200, 229]))


@pytest.mark.parametrize("query", ["SET threads = 2; SELECT {call} FROM docs", "EXECUTE later"])
def test_a_querys_cap_holds_for_rows_that_would_be_streamed(
    query: str, con: duckdb.DuckDBPyConnection, engine: Counting
) -> None:
    call = "complete('m', repeat(text || ' ', 50), {'max_tokens': 2})"
    con.execute(f"PREPARE later AS SELECT {call} FROM docs")
    with pytest.warns(CompletionWarning, match="The query's max_total_tokens"):
        answers = first(sql(con, query.format(call=call), max_total_tokens=2500))
    assert len(answers) == 6000
    assert 0 < 102 * len(engine.requests) <= 2500


def test_caps_of_two_queries_may_count_two_currencies(tmp_path: Path) -> None:
    models = tmp_path / "models.toml"
    models.write_text(
        "".join(
            f"[models.{c}]\ncheckpoint = '{c}'\nprices = {{ output = 1, currency = '{c}' }}\n" for c in ("EUR", "JPY")
        )
    )
    with duckdb.connect() as con, register(con, engine=Counting(), home=tmp_path, models_file=models):
        assert first(sql(con, "SELECT complete('EUR', 'a')", max_cost=1)) == ["a"]
        assert first(sql(con, "SELECT complete('JPY', 'a')", max_cost=1)) == ["a"]
        with pytest.raises(duckdb.Error, match="counts EUR, but 'JPY' is priced in JPY"):
            sql(con, "SELECT complete('EUR', 'b'), complete('JPY', 'b')", max_cost=1)


def test_the_registrations_cap_holds_beside_the_querys(tmp_path: Path) -> None:
    engine = Counting()
    with duckdb.connect() as con, register(con, engine=engine, home=tmp_path, max_total_tokens=1200):
        with pytest.warns(CompletionWarning, match=": max_total_tokens 1,200"):
            answers = first(
                sql(
                    con,
                    "SELECT complete('m', 'doc ' || i, {'max_tokens': 2}) FROM range(900) r(i)",
                    max_total_tokens=9999,
                )
            )
        assert 0 < len(engine.requests) == sum(answer is not None for answer in answers) <= 300


def test_a_cap_that_is_none_or_meets_another_is_refused(con: duckdb.DuckDBPyConnection, engine: Counting) -> None:
    with pytest.raises(InvalidOptionError, match="max_cost = 'plenty'"):
        sql(con, "SELECT complete('demo-llama', 'x')", max_cost="plenty")
    with pytest.raises(InvalidOptionError, match="max_total_tokens = -1"):
        sql(con, "SELECT complete('demo-llama', 'x')", max_total_tokens=-1)
    with registration_of(con).session.braked(1, None), pytest.raises(InputError, match="Another query is running"):
        sql(con, "SELECT complete('demo-llama', 'x')", max_cost=1)
    assert engine.requests == []
    assert first(sql(con, "SELECT complete('demo-llama', 'x')", max_cost=1)) == ["x"]


def test_faults_are_told_as_by_the_plain_run(con: duckdb.DuckDBPyConnection, engine: Counting) -> None:
    with pytest.raises(duckdb.Error, match="Unknown option 'nope'"):
        sql(con, "SELECT complete('m', text, {'nope': 1}) FROM docs")
    with pytest.raises(duckdb.Error, match="RowFailedError"):
        sql(con, "SELECT complete('m', 'bad', {'strict': true})")
    with duckdb.connect() as other, pytest.raises(InputError, match=r"Call register\(con\) first"):
        sql(other, "SELECT 1")


def test_interrupted_rounds_leave_the_connection_usable(con: duckdb.DuckDBPyConnection, engine: Counting) -> None:
    def interrupted(request: CompletionRequest) -> Completion:
        raise KeyboardInterrupt

    engine.complete = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        sql(con, "SELECT complete('m', text) FROM docs WHERE id < 3")
    del engine.complete  # type: ignore[method-assign]
    assert len(first(sql(con, "SELECT complete('m', text) FROM docs WHERE id < 3"))) == 3


EXPLAINED = {
    "two_rounds": "WITH c AS (SELECT complete('m', text) AS a, k FROM docs WHERE id % 100 = 0)\n"
    "SELECT complete('n', 'on ' || a) FROM c",
    "guarded": "SELECT id FROM docs WHERE complete('m', text) = 'doc 13' AND text LIKE '%13'",
    "cascade": "SELECT coalesce(complete('cheap', text), complete('strong', text)) FROM docs WHERE id < 50",
    "limited": "SELECT id FROM docs WHERE complete('m', text) = 'doc 13' LIMIT 3",
    "plainly": "SELECT complete('m', 'r' || random()) FROM docs",
}


@pytest.mark.parametrize("name", EXPLAINED)
def test_explain_is_printed_like_this(con: duckdb.DuckDBPyConnection, engine: Counting, name: str) -> None:
    con.execute("SELECT complete('m', text) FROM docs WHERE id % 200 = 0").fetchall()
    engine.requests.clear()
    text = str(explain(con, EXPLAINED[name]))
    assert text == (GOLDEN / f"explain_{name}.txt").read_text().rstrip("\n")
    assert engine.requests == []


def test_explain_goes_on_as_far_as_answers_are_known(con: duckdb.DuckDBPyConnection) -> None:
    query = EXPLAINED["two_rounds"]
    assert [s.prompts for s in explain(con, query).sites] == [60, None]
    sql(con, query).fetchall()
    found = explain(con, query)
    assert [(s.prompts, s.known) for s in found.sites] == [(60, 60), (60, 60)]
    assert found.rounds == 2
