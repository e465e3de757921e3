"""Cortex queries, unchanged: AI_COMPLETE and SNOWFLAKE.CORTEX.* with Snowflake's argument forms and results."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import pytest

from complete_fn import Completion, CompletionRequest, CompletionWarning, EchoEngine, Usage
from complete_fn.errors import InputError
from complete_fn_connectors.duckdb import register


class Cortex(EchoEngine):
    """Refuses what contains `bad`; answers a schema with an object that satisfies it."""

    def complete(self, request: CompletionRequest) -> Completion:
        if "bad" in str(request.prompt):
            return Completion.failed("blocked", "refused")
        if request.response_format is not None:
            return Completion('{"mood": "good"}', "stop", usage=Usage(3, 0, 4))
        return super().complete(request)


@pytest.fixture
def engine() -> Cortex:
    return Cortex()


@pytest.fixture
def con(engine: Cortex, tmp_path: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    with duckdb.connect() as opened:
        opened.execute("CREATE TABLE reviews AS SELECT 'm' AS model, 'text ' || i AS prompt FROM range(3) r(i)")
        register(opened, engine=engine, home=tmp_path, cortex=True)
        yield opened


def one(con: duckdb.DuckDBPyConnection, expression: str) -> Any:
    return con.execute(f"SELECT {expression} FROM reviews ORDER BY prompt LIMIT 1").fetchall()[0][0]


PARAMETERS = "{'temperature': 0, 'top_p': 0, 'max_tokens': 1, 'guardrails': FALSE}"
PLAIN = [
    "AI_COMPLETE('m', prompt)",
    "AI_COMPLETE(model, prompt)",
    "ai_complete(prompt => prompt, model => 'm')",
    "AI_COMPLETE('m', PROMPT('{0}', prompt))",
    "AI_COMPLETE(model => 'm', prompt => prompt, model_parameters => {'temperature': 0.2})",
    "AI_COMPLETE('m', prompt, {'temperature': 0.2}, NULL, FALSE)",
    "SNOWFLAKE.CORTEX.COMPLETE('m', prompt)",
    "Snowflake.Cortex.Try_Complete(model, prompt)",
]


@pytest.mark.parametrize("expression", PLAIN)
def test_the_plain_forms_answer_with_text(con: duckdb.DuckDBPyConnection, expression: str) -> None:
    assert one(con, expression) == "text 0"


def test_model_parameters_are_taken_in_snowflakes_terms(con: duckdb.DuckDBPyConnection, engine: Cortex) -> None:
    assert one(con, f"AI_COMPLETE('m', prompt, {PARAMETERS})") == "text"
    sampling = engine.requests[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.max_tokens) == (0, 1, 1)


@pytest.mark.parametrize(
    "expression",
    [
        "AI_COMPLETE('m', prompt, show_details => TRUE)",
        "AI_COMPLETE('m', prompt, {'temperature': 0}, NULL, TRUE)",
        "SNOWFLAKE.CORTEX.COMPLETE('m', [{'role': 'user', 'content': prompt}], {'temperature': 0})",
        "SNOWFLAKE.CORTEX.TRY_COMPLETE('m', [{'role': 'user', 'content': prompt}], {})".replace("{})", "NULL)"),
    ],
)
def test_details_are_snowflakes_object(con: duckdb.DuckDBPyConnection, expression: str) -> None:
    found = json.loads(one(con, expression))
    assert found["choices"] == [{"messages": "text 0"}]
    assert found["model"] == "m"
    assert found["usage"] == {"completion_tokens": 2, "prompt_tokens": 2, "total_tokens": 4}
    assert found["created"] > 1_700_000_000


def test_a_response_format_gives_an_object(con: duckdb.DuckDBPyConnection, engine: Cortex) -> None:
    form = "{'type': 'json', 'schema': {'type': 'object', 'properties': {'mood': {'type': 'string'}}}}"
    assert json.loads(one(con, f"AI_COMPLETE('m', prompt, response_format => {form})")) == {"mood": "good"}
    options = f"{{'temperature': 0, 'response_format': {form}}}"
    found = json.loads(one(con, f"SNOWFLAKE.CORTEX.COMPLETE('m', [{{'role': 'user', 'content': prompt}}], {options})"))
    assert found["structured_output"] == [{"raw_message": {"mood": "good"}, "type": "json"}]
    schema = '{"type":"object","properties":{"mood":{"type":"string"}}}'
    assert {r.response_format for r in engine.requests} == {schema}


@pytest.mark.parametrize(
    "arguments",
    [
        "return_error_details => TRUE",
        "{'temperature': 0}, return_error_details => TRUE",
        "{'temperature': 0}, {'type': 'object'}, FALSE, TRUE",
        "model_parameters => {'temperature': 0}, return_error_details => TRUE, show_details => FALSE",
        "response_format => {'type': 'object'}, return_error_details => TRUE",
    ],
)
def test_error_details_are_a_value_and_an_error(con: duckdb.DuckDBPyConnection, arguments: str) -> None:
    named = "=>" in arguments and "," in arguments and not arguments.startswith("{")
    model = "model => 'm', prompt => " if named else "'m', "
    with pytest.warns(CompletionWarning):
        bad = one(con, f"AI_COMPLETE({model}'bad ' || prompt, {arguments})")
    assert bad == {"value": None, "error": "refused"}
    good = one(con, f"AI_COMPLETE({model}prompt, {arguments})")
    assert good["error"] is None
    assert good["value"] in ("text 0", '{"mood": "good"}')


def test_a_failed_row_is_null_and_the_query_goes_on(con: duckdb.DuckDBPyConnection) -> None:
    with pytest.warns(CompletionWarning, match="1 blocked"):
        rows = con.execute(
            "SELECT SNOWFLAKE.CORTEX.COMPLETE('m', [{'role': 'user', 'content': p}], {'max_tokens': 9}) "
            "FROM (VALUES ('bad'), ('fine')) v(p)"
        ).fetchall()
    assert rows[0] == (None,)
    assert json.loads(rows[1][0])["choices"] == [{"messages": "fine"}]


def test_tokens_are_counted(con: duckdb.DuckDBPyConnection) -> None:
    assert one(con, "SNOWFLAKE.CORTEX.COUNT_TOKENS('m', prompt)") == 2


def test_guardrails_cannot_be_had(con: duckdb.DuckDBPyConnection) -> None:
    with pytest.raises(duckdb.Error, match="guardrails = true: no content filter is offered here"):
        one(con, "AI_COMPLETE('m', prompt, {'guardrails': TRUE})")


def test_cursors_take_the_same_queries_by_position(con: duckdb.DuckDBPyConnection) -> None:
    cursor = con.cursor()
    assert one(cursor, "SNOWFLAKE.CORTEX.COMPLETE('m', prompt)") == "text 0"
    assert one(cursor, f"AI_COMPLETE('m', prompt, {PARAMETERS})") == "text"
    with pytest.raises(duckdb.Error, match="in a cursor write the arguments by position"):
        one(cursor, "AI_COMPLETE('m', prompt, return_error_details => TRUE)")
    with pytest.raises(duckdb.Error, match="changes the type of the result"):
        one(cursor, "AI_COMPLETE('m', prompt, NULL, NULL, FALSE, TRUE)")


def test_an_existing_catalog_of_that_name_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "snowflake.duckdb"
    with duckdb.connect(str(path)) as con:
        with pytest.raises(InputError, match=r"A catalog named 'snowflake' is open \(.*snowflake.duckdb\)"):
            register(con, engine=EchoEngine(), home=tmp_path, cortex=True)
        with pytest.raises(duckdb.CatalogException):
            con.execute("SELECT complete('m', 'x')")  # nothing was registered by halves
        register(con, engine=EchoEngine(), home=tmp_path)
        assert con.execute("SELECT complete('m', 'x')").fetchall() == [("x",)]


def test_a_read_only_database_has_the_names_too(tmp_path: Path) -> None:
    path = str(tmp_path / "docs.duckdb")
    duckdb.connect(path).close()
    with duckdb.connect(path, read_only=True) as con:
        with register(con, engine=EchoEngine(), home=tmp_path, cortex=True):
            assert con.execute("SELECT SNOWFLAKE.CORTEX.COMPLETE('m', 'x')").fetchall() == [("x",)]
            assert con.execute("SELECT AI_COMPLETE(prompt => 'y', model => 'm')").fetchall() == [("y",)]
        assert con.execute("SELECT database_name FROM duckdb_databases() WHERE NOT internal").fetchall() == [("docs",)]


def test_closing_and_registering_again_frees_the_name(con: duckdb.DuckDBPyConnection, tmp_path: Path) -> None:
    registration = register(con, engine=EchoEngine(), home=tmp_path, cortex=True)
    assert one(con, "SNOWFLAKE.CORTEX.COMPLETE('m', prompt)") == "text 0"
    registration.close()
    with pytest.raises(duckdb.Error):
        con.execute("SELECT AI_COMPLETE('m', 'x')")
    con.execute("ATTACH ':memory:' AS snowflake")
