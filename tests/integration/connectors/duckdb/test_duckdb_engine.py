"""The embedded engine with `demo-llama`, asked by DuckDB and Polars over rows of the sample."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import polars as pl
import pytest

from complete_fn import CompletionWarning
from complete_fn_connectors.duckdb import Registration, register
from complete_fn_connectors.polars import expressions as llm

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

SAMPLE = Path(__file__).parents[4] / "sql" / "examples" / "packages.parquet"
MODEL = "demo-llama"


@pytest.fixture(scope="module")
def con(engine_home: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    with duckdb.connect() as opened:
        opened.execute(f"CREATE TABLE packages AS SELECT * FROM '{SAMPLE}' ORDER BY package LIMIT 40")
        yield opened


@pytest.fixture(scope="module")
def registration(con: duckdb.DuckDBPyConnection, engine_home: Path) -> Iterator[Registration]:
    with register(con, home=engine_home, cortex=True) as opened:
        yield opened


SECTION = f"SELECT package, complete('{MODEL}', 'Name the section: ' || description) FROM packages ORDER BY package"


def test_sections_are_named_once_and_polars_finds_them_known(
    con: duckdb.DuckDBPyConnection, registration: Registration, engine_home: Path
) -> None:
    rows = con.execute(SECTION).fetchall()
    sections = {s for (s,) in con.execute(f"SELECT DISTINCT section FROM '{SAMPLE}'").fetchall()}
    answers = [answer for _, answer in rows]
    assert all(answers)
    assert sum(a in sections for a in answers) >= 36
    assert "40 rows" in registration.summary()
    session = llm.configure(home=engine_home)
    frame = pl.DataFrame(con.sql("SELECT description FROM packages ORDER BY package").to_arrow_table())
    known = frame.select(pl.col("description").pipe(lambda d: llm.complete(MODEL, pl.lit("Name the section: ") + d)))
    assert known.to_series().to_list() == answers
    assert "40 known" in session.take_summary()
    session.close()


def test_a_cortex_query_runs_unchanged(con: duckdb.DuckDBPyConnection, registration: Registration) -> None:
    query = f"""
        SELECT AI_COMPLETE(model => '{MODEL}', prompt => CONCAT('Name the section: ', description)),
               SNOWFLAKE.CORTEX.COMPLETE('{MODEL}', 'Name the section: ' || description),
               SNOWFLAKE.CORTEX.COUNT_TOKENS('{MODEL}', description)
        FROM packages ORDER BY package LIMIT 3
    """
    for named, legacy, tokens in con.execute(query).fetchall():
        assert named == legacy != ""
        assert tokens > 3


def test_a_schema_holds_and_details_tell_the_usage(con: duckdb.DuckDBPyConnection, registration: Registration) -> None:
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {"section": {"type": "string"}, "synopsis": {"type": "string"}},
        "required": ["section", "synopsis"],
        "additionalProperties": False,
    }
    prompt = "prompt('Describe as JSON: {d}', {'d': description})"
    options = json.dumps({"response_format": schema, "max_tokens": 200})
    query = f"SELECT complete_details('{MODEL}', {prompt}, ?) FROM packages ORDER BY package LIMIT 4"
    found = [row for (row,) in con.execute(query, [options]).fetchall()]
    for row in found:
        assert row["usage"]["prompt_tokens"] > row["usage"]["cached_tokens"] >= 0
        assert row["cost"] > 0
        if row["error"] is None and row["finish_reason"] == "stop":
            assert set(json.loads(row["value"])) == {"section", "synopsis"}
    assert sum(row["finish_reason"] == "stop" for row in found) >= 3


@pytest.mark.filterwarnings("ignore:demo-llama is a demonstration")
def test_rows_that_cannot_be_answered_are_null(con: duckdb.DuckDBPyConnection, registration: Registration) -> None:
    long = "SELECT complete_details('demo-llama', 'Name the section: ' || repeat('very long ', 50000))['error']['code']"
    with pytest.warns(CompletionWarning, match="prompt_too_long"):
        assert con.execute(long).fetchall() == [("prompt_too_long",)]
    odd = "SELECT complete('demo-llama', p, {'max_tokens': 4}) IS NULL FROM (VALUES (''), ('😀 𝄞'), (NULL)) v(p)"
    assert con.execute(odd).fetchall() == [(False,), (False,), (True,)]
