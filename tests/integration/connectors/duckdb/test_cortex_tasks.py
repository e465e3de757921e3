"""Snowflake's task functions, unchanged, answered by the registration's task_model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import pytest

from complete_fn import EchoEngine
from complete_fn_connectors.duckdb import register
from tests.engines import Extracting


@pytest.fixture
def engine() -> Extracting:
    return Extracting()


@pytest.fixture
def con(engine: Extracting, tmp_path: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    with duckdb.connect() as opened:
        opened.execute("CREATE TABLE reviews AS FROM (VALUES ('a negative, negative bug yes yes')) v(review)")
        register(opened, engine=engine, home=tmp_path, cortex=True, task_model="m")
        yield opened


def one(con: duckdb.DuckDBPyConnection, expression: str) -> Any:
    return con.execute(f"SELECT {expression} FROM reviews").fetchall()[0][0]


LABELS = "[{'label': 'bug', 'description': 'a fault'}, {'label': 'other', 'description': NULL}]"


def test_the_documented_forms(con: duckdb.DuckDBPyConnection, engine: Extracting) -> None:
    assert json.loads(one(con, "AI_CLASSIFY(review, ['travel', 'bug'])")) == {"labels": ["bug"]}
    assert json.loads(one(con, f"AI_CLASSIFY(input => review, categories => {LABELS})")) == {"labels": ["bug"]}
    assert "categories: bug (a fault), other.\n" in str(engine.requests[-1].prompt)
    assert json.loads(one(con, "SNOWFLAKE.CORTEX.CLASSIFY_TEXT(review, ['travel', 'bug'])")) == {"label": "bug"}
    assert one(con, "AI_FILTER(PROMPT('Is this about a bug? {0}', review))") is True
    assert one(con, "AI_FILTER(review)") is True
    found = json.loads(one(con, "AI_SENTIMENT(review)"))
    assert found == {"categories": [{"name": "overall", "sentiment": "negative"}]}
    assert one(con, "SNOWFLAKE.CORTEX.SENTIMENT(review)") == pytest.approx(1 / 6 - 3 / 6)
    assert "from its own language to fr." in one(con, "AI_TRANSLATE(review, '', 'fr')")
    assert "from en to fr." in one(con, "SNOWFLAKE.CORTEX.TRANSLATE(review, 'en', 'fr')")
    assert one(con, "SNOWFLAKE.CORTEX.SUMMARIZE(review)").startswith("Summarize the text")
    found = json.loads(one(con, "AI_EXTRACT(text => review, responseFormat => {'who': 'Who wrote it?'})"))
    assert found == {"error": None, "response": {"who": "x"}}
    assert {r.model for r in engine.requests} == {"m"}


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        (
            "AI_CLASSIFY(review, ['a', 'b'], {'output_mode': 'multi'})",
            "output_mode.* is not supported; write AI_CLASSIFY",
        ),
        ("AI_SENTIMENT(review, ['price'])", r"2 arguments were given; write AI_SENTIMENT\(text\)"),
        ("AI_EXTRACT(review, [])", "fields is .*Write names"),
    ],
)
def test_what_is_not_offered_is_refused(con: duckdb.DuckDBPyConnection, expression: str, message: str) -> None:
    with pytest.raises(duckdb.Error, match=message):
        one(con, expression)


def test_without_a_task_model_the_remedy_is_named(tmp_path: Path) -> None:
    with duckdb.connect() as con:
        con.execute("CREATE TABLE reviews AS SELECT 'x' AS review")
        with (
            register(con, engine=EchoEngine(), home=tmp_path, cortex=True),
            pytest.raises(duckdb.Error, match=r"AI_FILTER names no model: register\(con, cortex=True, task_model="),
        ):
            one(con, "AI_FILTER(review)")
