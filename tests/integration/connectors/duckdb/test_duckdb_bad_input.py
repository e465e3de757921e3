"""What a person gets wrong, and what the data has in it: each told with the value and the remedy, before it is paid."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import pytest

from complete_fn import CompletionWarning, EchoEngine
from complete_fn.errors import CompleteError, InputError, InvalidOptionError, UnknownModelError
from complete_fn_connectors.duckdb import Registration, register


@pytest.fixture
def engine() -> EchoEngine:
    return EchoEngine(context=100)


@pytest.fixture
def con(engine: EchoEngine, tmp_path: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    with duckdb.connect() as opened:
        opened.execute("CREATE TABLE docs AS SELECT i AS id, 'doc ' || i AS text FROM range(3) r(i)")
        yield opened


@pytest.fixture
def registration(con: duckdb.DuckDBPyConnection, engine: EchoEngine, tmp_path: Path) -> Registration:
    return register(con, engine=engine, home=tmp_path)


def test_an_unknown_model_names_the_nearest(con: duckdb.DuckDBPyConnection, tmp_path: Path) -> None:
    registration = register(con, home=tmp_path)
    with pytest.raises(duckdb.Error, match=r"Model 'demo-lama' is not in the catalogue. Did you mean 'demo-llama'\?"):
        con.execute("SELECT complete('demo-lama', text) FROM docs").fetchall()
    assert isinstance(registration.error, UnknownModelError)
    with pytest.warns(CompletionWarning, match="demo-lama"):
        assert con.execute("SELECT DISTINCT try_complete('demo-lama', text) FROM docs").fetchall() == [(None,)]


FAULTS: dict[str, tuple[type[CompleteError], str]] = {
    "complete('m', text, {'temperature': 3})": (InvalidOptionError, "temperature = 3 must be a number at least 0"),
    "complete('m', text, {'temprature': 1})": (InvalidOptionError, "Did you mean 'temperature'"),
    "complete('m', text, {'max_tokens': 0})": (InvalidOptionError, "max_tokens = 0 must be a whole number"),
    "complete('m', text, {'max_tokens': 'many'})": (InvalidOptionError, "max_tokens = 'many'"),
    "complete('m', text, {'stop': ['']})": (InvalidOptionError, "none empty"),
    "complete('m', text, '{')": (InvalidOptionError, "The options '{' are not JSON"),
    "complete('m', text, 7)": (InvalidOptionError, "The options are 7"),
    "complete('m', text, {'response_format': '{\"type\": 3}'})": (
        InvalidOptionError,
        "valid JSON schema at type",
    ),
    "complete('m', text, {'response_format': 'no json'})": (InvalidOptionError, "response_format is not JSON"),
    "complete('m', text, {'response_format': {'type': 'no_such_type'}})": (
        InvalidOptionError,
        "not a valid JSON schema",
    ),
    "complete('m', id)": (InputError, r"The prompt is int64.*CAST\(x AS VARCHAR\)"),
    "complete('m', text::BLOB)": (InputError, "The prompt is binary"),
    "complete('m', {'x': text})": (InputError, "The prompt is struct<x: string>"),
    "complete('m', [text])": (InputError, "The prompt is list"),
    "complete(id, text)": (InputError, "The model is int64; it must be a name"),
    "complete('m')": (InputError, r"1 arguments were given; write complete\(model, prompt \[, options\]\)"),
    "complete('m', text, {'seed': 1}, 4)": (InputError, "4 arguments were given"),
    "complete('m', prompt('{a.b}', {'a': text}))": (InvalidOptionError, "only {name} is replaced"),
    "complete('m', prompt('{b}', {'a': text}))": (InputError, "names {b}, which is not among the fields"),
    "complete('m', prompt('{a}', {'a': text::BLOB}))": (InputError, "'a' is binary"),
    "complete('m', prompt('{1}', text))": (InputError, r"The template '\{1\}' names \{1\}, which is not"),
    "complete('m', prompt(1, text))": (InputError, r"The template of prompt\(\) is int32"),
    "count_tokens('m', id)": (InputError, "the text is int64"),
    "count_tokens('m')": (InputError, "1 arguments were given"),
}


@pytest.mark.parametrize("call", FAULTS)
def test_query_faults_are_told_before_anything_is_asked(
    con: duckdb.DuckDBPyConnection, registration: Registration, engine: EchoEngine, call: str
) -> None:
    kind, message = FAULTS[call]
    with pytest.raises(duckdb.Error, match=message):
        con.execute(f"SELECT {call} FROM docs").fetchall()
    assert type(registration.error) is kind
    assert engine.requests == []


def test_no_such_column_is_duckdbs_own_error(con: duckdb.DuckDBPyConnection, registration: Registration) -> None:
    with pytest.raises(duckdb.BinderException, match="txt"):
        con.execute("SELECT complete('m', txt) FROM docs")


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "\n",
        "naïve – ünïcödé",
        "😀 𝄞 𐍈 四",
        "a\x01b",
        "x" * 1_000_000,
        "'; DROP TABLE docs; --",
        "{not a field}",
    ],
)
def test_any_text_comes_through_as_it_is(
    con: duckdb.DuckDBPyConnection, registration: Registration, engine: EchoEngine, text: str
) -> None:
    con.execute("SELECT complete('m', ?), complete('m', p) FROM (SELECT ? AS p)", [text, text]).fetchall()
    assert [r.prompt for r in engine.requests] == [text]


def test_a_prompt_too_long_is_a_row_error(con: duckdb.DuckDBPyConnection, registration: Registration) -> None:
    with pytest.warns(CompletionWarning, match="1 prompt_too_long"):
        rows = con.execute("SELECT complete('m', p) FROM (VALUES (repeat('word ', 200000)), ('fine')) v(p)").fetchall()
    assert rows == [(None,), ("fine",)]
    details = "SELECT complete_details('m', repeat('word ', 200000))['error']"
    with pytest.warns(CompletionWarning):
        error: dict[str, Any] = con.execute(details).fetchall()[0][0]
    assert error == {
        "code": "prompt_too_long",
        "message": "The prompt has 200000 tokens; the model's context is 100.",
    }


def test_duckdb_refuses_a_lone_surrogate_itself(con: duckdb.DuckDBPyConnection, registration: Registration) -> None:
    with pytest.raises((duckdb.Error, RuntimeError), match=r"surrogate|Unable to cast"):
        con.execute("SELECT complete('m', ?)", ["\ud800"])


def test_the_connection_is_usable_after_an_error(con: duckdb.DuckDBPyConnection, registration: Registration) -> None:
    with pytest.raises(duckdb.Error):
        con.execute("SELECT complete('m', id) FROM docs").fetchall()
    con.execute("BEGIN")
    with pytest.raises(duckdb.Error):
        con.execute("INSERT INTO docs SELECT id, complete('m', id) FROM docs").fetchall()
    con.execute("ROLLBACK")
    assert con.execute("SELECT count(complete('m', text)) FROM docs").fetchall() == [(3,)]
