"""DuckDB: the functions in real queries, what comes back, what is paid, and what the database keeps of it (nothing)."""

from __future__ import annotations

import re
import sqlite3
import threading
import time
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from pathlib import Path
from typing import Any

import duckdb
import pytest

from complete_fn import Completion, CompletionRequest, CompletionWarning, EchoEngine
from complete_fn.errors import InputError, InvalidOptionError
from complete_fn.session import Session
from complete_fn_connectors.duckdb import Registration, register


class Blocking(EchoEngine):
    """An EchoEngine whose content filter refuses what contains `bad`."""

    def complete(self, request: CompletionRequest) -> Completion:
        if "bad" in str(request.prompt):
            return Completion.failed("blocked", "The content filter refused the row.")
        return super().complete(request)


@pytest.fixture
def engine() -> Blocking:
    return Blocking()


@pytest.fixture
def con(engine: Blocking, tmp_path: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    with duckdb.connect() as opened:
        opened.execute("CREATE TABLE docs AS SELECT i AS id, 'doc ' || i AS text, 'm' AS model FROM range(5) r(i)")
        register(opened, engine=engine, home=tmp_path)
        yield opened


def column(con: duckdb.DuckDBPyConnection, query: str, *arguments: Any) -> list[Any]:
    return [row[0] for row in con.execute(query, *arguments).fetchall()]


DOCS = [f"doc {i}" for i in range(5)]


def test_a_column_is_answered_in_row_order(con: duckdb.DuckDBPyConnection) -> None:
    assert column(con, "SELECT complete('m', text) FROM docs ORDER BY id DESC") == DOCS[::-1]


def test_nulls_stay_null_and_an_empty_prompt_is_asked(con: duckdb.DuckDBPyConnection, engine: Blocking) -> None:
    query = "SELECT complete('m', p) FROM (VALUES ('x'), (NULL), ('')) v(p)"
    assert column(con, query) == ["x", None, ""]
    assert con.execute("SELECT complete(NULL, 'y'), complete('m', NULL), complete('m', 'x', NULL)").fetchall() == [
        (None, None, "x")
    ]
    assert sorted(str(r.prompt) for r in engine.requests) == ["", "x"]


@pytest.mark.parametrize("options", ["{'max_tokens': 1}", "'{\"max_tokens\": 1}'", "MAP {'max_tokens': 1}"])
def test_options_are_a_struct_json_text_or_a_map(con: duckdb.DuckDBPyConnection, options: str) -> None:
    assert column(con, f"SELECT complete('m', text, {options}) FROM docs LIMIT 1") == ["doc"]


def test_sql_numbers_reach_the_engine_as_they_are_written(con: duckdb.DuckDBPyConnection, engine: Blocking) -> None:
    con.execute("SELECT complete('m', text, {'temperature': 0.5, 'top_k': 4, 'stop': ['.']}) FROM docs").fetchall()
    sampling = engine.requests[0].sampling
    assert (sampling.temperature, sampling.top_k, sampling.stop) == (0.5, 4, (".",))


def test_model_and_options_may_vary_by_row(con: duckdb.DuckDBPyConnection, engine: Blocking) -> None:
    query = "SELECT complete('m' || id % 2, text, {'max_tokens': 1 + id % 2}) FROM docs ORDER BY id"
    assert column(con, query) == ["doc", "doc 1", "doc", "doc 3", "doc"]
    assert {r.model for r in engine.requests} == {"m0", "m1"}


def test_a_schema_is_written_as_a_struct(con: duckdb.DuckDBPyConnection, engine: Blocking) -> None:
    properties = "{'a': {'type': 'string'}, 'b': {'type': 'array', 'items': {'type': 'number'}}}"
    schema = f"{{'type': 'object', 'properties': {properties}}}"
    con.execute(f"SELECT complete('m', text, {{'response_format': {schema}}}) FROM docs LIMIT 1").fetchall()
    assert engine.requests[0].response_format == (
        '{"type":"object","properties":{"a":{"type":"string"},"b":{"type":"array","items":{"type":"number"}}}}'
    )


def test_details_have_every_field_and_what_each_row_cost(con: duckdb.DuckDBPyConnection) -> None:
    query = "SELECT complete_details('demo-llama', p) FROM (VALUES ('Name the section: a b'), (NULL), ('x bad')) v(p)"
    with pytest.warns(CompletionWarning):
        good, null, bad = column(con, query)
    assert good == {
        "value": "Name the section: a b",
        "error": None,
        "finish_reason": "stop",
        "usage": {"prompt_tokens": 5, "cached_tokens": 0, "completion_tokens": 5},
        "cost": Decimal("0.000000300"),  # 5 tokens in at 0.01, 5 out at 0.05 per million
        "source": "computed",
        "scores": None,
        "field_order": None,
    }
    assert null is None
    assert (bad["value"], bad["error"]["code"], bad["cost"]) == (None, "blocked", 0)
    kind = con.execute("SELECT typeof(complete_details('m', 'x'))").fetchall()[0][0]
    assert '"cost" DECIMAL(18,9)' in kind


def test_duplicates_are_computed_once_and_known_answers_never_again(
    con: duckdb.DuckDBPyConnection, engine: Blocking
) -> None:
    query = "SELECT complete_details('m', 'doc ' || i % 2) FROM range(6) r(i)"
    sources = [d["source"] for d in column(con, query)]
    assert sorted(sources) == ["computed"] * 2 + ["duplicate"] * 4
    assert {d["source"] for d in column(con, query)} == {"cache"}
    assert len(engine.requests) == 2


def test_templates_keep_fields_apart(con: duckdb.DuckDBPyConnection) -> None:
    query = "SELECT complete('m', prompt('{id}: {t} {{x}}', {'id': id, 't': text})) FROM docs LIMIT 1"
    assert column(con, query) == ["0: doc 0 {x}"]
    assert column(con, "SELECT complete('m', prompt('{0}/{1}', text, id)) FROM docs LIMIT 1") == ["doc 0/0"]


def test_messages_reach_the_engine_as_messages(con: duckdb.DuckDBPyConnection, engine: Blocking) -> None:
    history = "[{'role': 'system', 'content': 'brief'}, {'role': 'user', 'content': text}]"
    assert column(con, f"SELECT complete('m', {history}) FROM docs LIMIT 1") == ["brief doc 0"]
    prompt = engine.requests[0].prompt
    assert [(m.role, m.content) for m in prompt] == [("system", "brief"), ("user", "doc 0")]  # type: ignore[union-attr]


def test_tokens_are_counted(con: duckdb.DuckDBPyConnection) -> None:
    assert column(con, "SELECT count_tokens('m', p) FROM (VALUES ('a b c'), (NULL), ('')) v(p)") == [3, None, 0]


QUERIES = {
    "SELECT id FROM docs WHERE complete('m', text) = 'doc 3'": [3],
    "SELECT upper(complete('m', text)) AS a FROM docs ORDER BY complete('m', text) DESC LIMIT 2": ["DOC 4", "DOC 3"],
    "SELECT count(*) FROM docs GROUP BY length(complete('m', text))": [5],
    "SELECT string_agg(complete('m', text), '|' ORDER BY id) FROM docs WHERE id < 2": ["doc 0|doc 1"],
    "SELECT a.id FROM docs a JOIN docs b ON complete('m', a.text) = b.text AND b.id = 2": [2],
    "SELECT (SELECT complete('m', max(text)) FROM docs)": ["doc 4"],
    "SELECT id FROM docs WHERE text IN (SELECT complete('m', text) FROM docs WHERE id > 3)": [4],
    "SELECT complete('m', complete('m', text) || ' again') FROM docs WHERE id = 1": ["doc 1 again"],
    "SELECT first_value(complete('m', text)) OVER (ORDER BY id) FROM docs LIMIT 1": ["doc 0"],
    "SELECT complete('m', text)::VARCHAR FROM docs UNION SELECT 'doc 0' ORDER BY 1": DOCS,
    "WITH a AS (SELECT complete('m', text) c FROM docs) SELECT max(c) FROM a": ["doc 4"],
    "SELECT CASE WHEN id = 0 THEN complete('m', text) END FROM docs ORDER BY id LIMIT 2": ["doc 0", None],
    "SELECT unnest([complete('m', text), 'x']) FROM docs WHERE id = 0": ["doc 0", "x"],
    "SELECT list_transform([text], lambda t: complete('m', t))[1] FROM docs ORDER BY id LIMIT 1": ["doc 0"],
}


@pytest.mark.parametrize("query", QUERIES)
def test_it_works_wherever_sql_takes_a_scalar(con: duckdb.DuckDBPyConnection, query: str) -> None:
    assert column(con, query) == QUERIES[query]


def test_tables_views_inserts_and_copies_hold_answers(con: duckdb.DuckDBPyConnection, tmp_path: Path) -> None:
    con.execute("CREATE TABLE answers AS SELECT id, complete('m', text) AS answer FROM docs")
    con.execute("INSERT INTO answers VALUES (9, complete('m', 'one more'))")
    con.execute("UPDATE answers SET answer = complete('m', answer || ' b') WHERE id = 0")
    con.execute("CREATE VIEW seen AS SELECT complete('m', answer) AS again FROM answers WHERE id IN (0, 9)")
    assert sorted(column(con, "SELECT again FROM seen")) == ["doc 0 b", "one more"]
    con.execute(f"COPY (SELECT complete('m', text) AS a FROM docs) TO '{tmp_path}/out.parquet'")
    assert column(con, f"SELECT count(a) FROM '{tmp_path}/out.parquet'") == [5]


def test_top_n_asks_only_for_the_rows_it_keeps(con: duckdb.DuckDBPyConnection, engine: Blocking) -> None:
    """DuckDB postpones a call on a column to the rows that are left; one on an expression it does not."""
    con.execute("CREATE TABLE many AS SELECT i, 'p' || i AS p FROM range(100000) r(i)")
    query = "SELECT complete('m', p) FROM many ORDER BY i DESC LIMIT 3"
    assert column(con, query) == ["p99999", "p99998", "p99997"]
    assert len(engine.requests) == 3


def test_cursors_and_threads_share_the_functions(con: duckdb.DuckDBPyConnection, engine: Blocking) -> None:
    def ask(_: int) -> list[Any]:
        return column(con.cursor(), "SELECT complete('m', text) FROM docs ORDER BY id")

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(24))) == [DOCS] * 24
    assert len(engine.requests) == 5


def test_many_rows_run_on_duckdbs_own_threads(con: duckdb.DuckDBPyConnection, engine: Blocking) -> None:
    con.execute("SET threads = 4")
    con.execute("CREATE TABLE many AS SELECT i, 'p ' || i % 1000 AS p FROM range(300000) r(i)")
    assert column(con, "SELECT count(*) FROM many WHERE complete('m', p) = p") == [300_000]
    assert len(engine.requests) == 1000


def test_row_errors_are_null_with_one_counted_warning(con: duckdb.DuckDBPyConnection) -> None:
    query = "SELECT complete('m', CASE WHEN i % 2 = 0 THEN 'bad ' || i ELSE 'good' END) FROM range(9000) r(i)"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        answers = column(con, query)
    assert (answers.count(None), answers.count("good")) == (4500, 4500)
    texts = [str(w.message) for w in caught if issubclass(w.category, CompletionWarning)]
    assert len(texts) == 1
    assert "blocked" in texts[0]
    assert "complete_details() shows each" in texts[0]


def test_strict_raises_for_a_failed_row(con: duckdb.DuckDBPyConnection) -> None:
    with pytest.raises(duckdb.Error, match=r"RowFailedError: 1 of 1 rows have no answer \(1 blocked\)"):
        con.execute("SELECT complete('m', 'bad ' || id, {'strict': true}) FROM docs LIMIT 1").fetchall()


def test_try_complete_turns_query_faults_into_null(con: duckdb.DuckDBPyConnection) -> None:
    with pytest.warns(CompletionWarning, match="Unknown option 'temprature'"):
        assert column(con, "SELECT try_complete('m', text, {'temprature': 1}) FROM docs") == [None] * 5
    assert column(con, "SELECT try_complete('m', text) FROM docs ORDER BY id") == DOCS


def test_a_cap_is_never_passed(tmp_path: Path) -> None:
    with duckdb.connect() as con, register(con, engine=EchoEngine(), home=tmp_path, max_cost="0.0001") as registration:
        query = "SELECT complete('demo-llama', 'Name the section: ' || i) AS a FROM range(2000) r(i)"
        with pytest.warns(CompletionWarning, match="budget_exceeded"):
            answers = column(con, query)
        assert 0 < answers.count(None) < 2000
        budget = registration.session.budgets.money
        assert budget is not None
        assert 0 < budget.spent <= budget.limit
        assert budget.reserved == 0


def test_the_summary_tells_of_all_since_the_last_one(con: duckdb.DuckDBPyConnection, tmp_path: Path) -> None:
    with register(con, engine=EchoEngine(), home=tmp_path / "b") as registration:
        con.execute("SELECT complete('demo-llama', 'Name the section: ' || id % 2) FROM docs").fetchall()
        line = registration.summary()
        assert line.startswith("5 rows · 2 distinct · 8 tokens in")
        assert "USD 0.000000 at example prices" in line
        assert registration.summary().startswith("0 rows")


def test_a_query_in_pieces_has_one_bar(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Slow(EchoEngine):
        def stream(self, requests: Iterable[CompletionRequest], tenant: str) -> Iterator[tuple[int, Completion]]:
            time.sleep(0.6)
            return super().stream(requests, tenant)

    with duckdb.connect() as con:
        register(con, engine=Slow(), home=tmp_path, progress=True)
        con.execute("SET threads = 1")
        con.execute("CREATE TABLE many AS SELECT 'x' || i AS p FROM range(5000) r(i)")
        assert column(con, "SELECT count(complete('m', p)) FROM many") == [5000]
        time.sleep(1)  # the bar closes when no further piece comes
    drawn = [line for line in re.split(r"[\r\n]", capsys.readouterr().err) if line.strip()]
    assert "5000/5000" in drawn[-1]
    assert "tokens/s, USD 0.0000" in drawn[-1]
    assert sum(line.startswith("m: 100%") for line in drawn) >= 1


def test_ledger_lines_carry_the_tag(tmp_path: Path) -> None:
    with duckdb.connect() as con, register(con, engine=EchoEngine(), home=tmp_path, query_tag="nightly"):
        con.execute("SELECT complete('m', 'x' || i) FROM range(3) r(i)").fetchall()
    lines = sqlite3.connect(tmp_path / "state.sqlite3").execute("SELECT DISTINCT query_tag FROM ledger").fetchall()
    assert lines == [("nightly",)]


def test_a_database_file_keeps_nothing_of_it(tmp_path: Path) -> None:
    path = str(tmp_path / "docs.duckdb")
    with duckdb.connect(path) as con:
        con.execute("CREATE TABLE docs AS SELECT 'doc ' || i AS text FROM range(3) r(i)")
        register(con, engine=EchoEngine(), home=tmp_path / "home", cortex=True)
        con.execute("CREATE TABLE answers AS SELECT complete('m', text) AS a FROM docs")
    with duckdb.connect(path) as con:
        assert column(con, "SELECT a FROM answers ORDER BY a") == DOCS[:3]
        mine = (
            "SELECT function_name FROM duckdb_functions() WHERE function_name IN ('complete', 'ai_complete', 'prompt')"
        )
        assert column(con, mine) == []
        assert column(con, "SELECT database_name FROM duckdb_databases() WHERE NOT internal") == ["docs"]


def test_a_read_only_file_is_answered_too(tmp_path: Path) -> None:
    path = str(tmp_path / "docs.duckdb")
    with duckdb.connect(path) as con:
        con.execute("CREATE TABLE docs AS SELECT 'doc ' || i AS text FROM range(3) r(i)")
    with duckdb.connect(path, read_only=True) as con:
        register(con, engine=EchoEngine(), home=tmp_path / "home")
        assert column(con, "SELECT complete('m', text) FROM docs ORDER BY text") == DOCS[:3]


def test_registering_again_replaces(con: duckdb.DuckDBPyConnection, tmp_path: Path, engine: Blocking) -> None:
    other = EchoEngine()
    register(con, engine=other, home=tmp_path / "other")
    assert column(con, "SELECT complete('m', text) FROM docs ORDER BY id") == DOCS
    assert (len(engine.requests), len(other.requests)) == (0, 5)


def test_registering_a_cursor_of_a_registered_connection_is_refused(con: duckdb.DuckDBPyConnection) -> None:
    with pytest.raises(InputError, match="has a function named 'complete' already"):
        register(con.cursor(), engine=EchoEngine())
    assert column(con.cursor(), "SELECT complete('m', 'still there')") == ["still there"]


def test_registering_inside_a_transaction_is_refused(tmp_path: Path) -> None:
    with duckdb.connect() as con:
        con.begin()
        with pytest.raises(InputError, match=r"inside a transaction\. COMMIT or ROLLBACK it, then register"):
            register(con, engine=EchoEngine(), home=tmp_path)
        con.rollback()
        register(con, engine=EchoEngine(), home=tmp_path)
        con.begin()
        assert column(con, "SELECT complete('m', 'x')") == ["x"]
        con.rollback()
        assert column(con, "SELECT complete('m', 'y')") == ["y"]


def test_the_module_stands_for_its_default_connection(tmp_path: Path) -> None:
    register(duckdb, engine=EchoEngine(), home=tmp_path)
    with register(duckdb.default_connection(), engine=EchoEngine(), home=tmp_path):
        assert duckdb.sql("SELECT complete('m', 'x')").fetchall() == [("x",)]


def test_an_unread_result_keeps_its_rows_and_stops_nothing_by_halves(tmp_path: Path) -> None:
    with duckdb.connect() as con:
        registration = register(con, engine=EchoEngine(), home=tmp_path, cortex=True)
        con.execute("SELECT complete('m', 'x' || i) FROM range(5) r(i)")
        expected = [(f"x{i}",) for i in range(5)]
        names = "SELECT count(*) FROM duckdb_functions() WHERE function_name ILIKE '%complete%'"
        try:
            registration.close()
        except duckdb.Error as error:
            assert "unfinished result" in str(error)  # noqa: PT017
            assert con.fetchall() == expected
            assert column(con, "SELECT SNOWFLAKE.CORTEX.COMPLETE('m', 'still there')") == ["still there"]
        else:  # DuckDB 1 lets the functions go, and drops the rows as another execute() would
            assert duckdb.__version__ < "2"
            assert con.fetchall() == []
            assert column(con, names) == [0]


def test_interrupt_stops_what_runs(tmp_path: Path) -> None:
    class Endless(EchoEngine):
        def complete(self, request: CompletionRequest) -> Completion:
            started.set()
            time.sleep(0.05)
            return super().complete(request)

    started = threading.Event()
    with duckdb.connect() as con, register(con, engine=Endless(), home=tmp_path) as registration:
        threading.Thread(target=lambda: (started.wait(), time.sleep(0.5), registration.interrupt())).start()
        began = time.monotonic()
        with pytest.raises(duckdb.Error, match="the query was interrupted; finished rows are kept"):
            con.execute("SELECT complete('m', 'x' || i) FROM range(2000) r(i)").fetchall()
        assert time.monotonic() - began < 10
        assert column(con, "SELECT complete('m', 'after')") == ["after"]


def test_closing_takes_the_functions_away(con: duckdb.DuckDBPyConnection, tmp_path: Path) -> None:
    registration = register(con, engine=EchoEngine(), home=tmp_path)
    registration.close()
    registration.close()
    with pytest.raises(duckdb.CatalogException, match="complete"):
        con.execute("SELECT complete('m', 'x')")


def test_a_cursor_outlives_the_variable_of_its_connection(tmp_path: Path) -> None:
    def cursor() -> duckdb.DuckDBPyConnection:
        con = duckdb.connect()
        register(con, engine=EchoEngine(), home=tmp_path)
        return con.cursor()

    assert column(cursor(), "SELECT complete('m', 'x' || i) FROM range(2) r(i)") == ["x0", "x1"]


def test_an_error_is_reachable_as_it_was_raised(con: duckdb.DuckDBPyConnection, tmp_path: Path) -> None:
    registration: Registration = register(con, engine=EchoEngine(), home=tmp_path)
    with pytest.raises(duckdb.Error, match=r"InvalidOptionError: Unknown option 'seeed'. Did you mean 'seed'\?"):
        con.execute("SELECT complete('m', text, {'seeed': 1}) FROM docs").fetchall()
    assert isinstance(registration.error, InvalidOptionError)


def test_a_bad_cap_leaves_the_connection_as_it_was(con: duckdb.DuckDBPyConnection) -> None:
    with pytest.raises(InvalidOptionError, match="max_cost"):
        register(con, max_cost="plenty")
    assert column(con, "SELECT complete('m', 'x')") == ["x"]


def test_relations_and_arrow_results(con: duckdb.DuckDBPyConnection, engine: Blocking) -> None:
    relation = con.sql("SELECT id, complete('m', text) AS answer FROM docs ORDER BY id")
    assert relation.columns == ["id", "answer"]
    assert engine.requests == []
    assert relation.to_arrow_table().column("answer").to_pylist() == DOCS
    assert "doc 4" in repr(relation)
    assert len(engine.requests) == 5


def test_what_duckdb_paid_for_python_finds(con: duckdb.DuckDBPyConnection, tmp_path: Path) -> None:
    con.execute("SELECT complete('m', text) FROM docs").fetchall()
    session = Session(engine=Blocking(), home=tmp_path)
    assert session.complete("m", DOCS).summary.reused == 5
    session.close()
