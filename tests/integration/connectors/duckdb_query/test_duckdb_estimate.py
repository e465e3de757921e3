"""`estimate(con, query)`: what `sql` would take, against what it then takes. Nothing is asked for it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import duckdb
import pytest

from complete_fn import CompletionWarning, EchoEngine
from complete_fn_connectors.duckdb import estimate, register, sql

MODELS = (
    "[models.echo]\ncheckpoint = 'e'\ndefault_max_tokens = 8\nprices = { input = 2, output = 4, currency = 'EUR' }\n"
)


@pytest.fixture
def engine() -> EchoEngine:
    return EchoEngine()


@pytest.fixture
def con(engine: EchoEngine, tmp_path: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    (tmp_path / "models.toml").write_text(MODELS)
    with duckdb.connect() as opened:
        opened.execute("CREATE TABLE docs AS SELECT i AS id, 'doc ' || i % 50 AS text FROM range(500) r(i)")
        register(opened, engine=engine, home=tmp_path / "h", models_file=tmp_path / "models.toml", progress=False)
        yield opened


def test_what_a_query_would_ask_is_counted_and_priced(con: duckdb.DuckDBPyConnection, engine: EchoEngine) -> None:
    query = "SELECT complete('echo', text) AS answer FROM docs WHERE id % 2 = 0"
    found = estimate(con, query)
    assert engine.requests == []
    (part,) = found.parts
    assert (part.distinct, part.tokens.prompts, part.output) == (25, 25, 25 * 8)
    assert "25 prompts with echo" in str(found)
    sql(con, query).fetchall()
    assert len(engine.requests) == 25
    after = estimate(con, query)
    assert after.price == {"EUR": Decimal(0)}
    assert "known answers  25 rows" in str(after)
    assert len(engine.requests) == 25


def test_what_depends_on_answers_is_left_open(con: duckdb.DuckDBPyConnection, engine: EchoEngine) -> None:
    query = "SELECT complete('echo', complete('echo', text) || '!') FROM docs"
    found = estimate(con, query)
    assert [p.tokens.prompts for p in found.parts] == [50]
    assert len(found.open) == 1
    assert "NOT KNOWN BEFORE" in str(found)
    sql(con, query).fetchall()
    assert estimate(con, query).open == []


def test_a_query_that_is_not_planned_says_so(con: duckdb.DuckDBPyConnection, engine: EchoEngine) -> None:
    found = estimate(con, "SELECT complete('echo', text || random()) FROM docs")
    assert found.parts == []
    assert "NOT KNOWN BEFORE" in str(found)
    assert engine.requests == []


def test_fields_in_any_order_give_each_row_its_own_answer(con: duckdb.DuckDBPyConnection, engine: EchoEngine) -> None:
    con.execute("CREATE TABLE pairs AS SELECT 'key ' || i % 7 AS a, 'long text ' || i % 11 AS b FROM range(200) r(i)")
    query = (
        "SELECT a, b, complete('echo', prompt('Name it. {a} {b}', {'a': a, 'b': b}), "
        "{'max_tokens': 50, 'reorder_fields': true}) FROM pairs"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", CompletionWarning)
        for run in (lambda: sql(con, query), lambda: con.execute(query)):
            rows = run().fetchall()
            assert len(rows) == 200
            for a, b, answer in rows:
                assert sorted(answer.split()) == sorted(f"Name it. a: {a} b: {b}".split())
    assert len(engine.requests) == 77
