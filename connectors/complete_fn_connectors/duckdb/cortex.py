"""Snowflake's names and argument forms, so that a query written for Snowflake Cortex runs unchanged."""

from __future__ import annotations

import contextlib
import json
import tempfile
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
from duckdb.func import ARROW

from complete_fn.errors import InputError, InvalidOptionError
from complete_fn.execution.answers import Answers
from complete_fn.session import Session
from complete_fn.types import Completion
from complete_fn_connectors.arrow import CallGroup, is_constant, one_array, option_mapping, python_values
from complete_fn_connectors.duckdb_query.call_sites import NAMED
from complete_fn_connectors.duckdb_query.syntax_tree import sql_literal
from complete_fn_connectors.functions import answer_rows
from complete_fn_connectors.sql_functions import AI_COMPLETE, FUNCTIONS, TEXT_OR_ERROR


def cortex_options(parameters: Any, response_format: Any = None) -> dict[str, Any]:
    """Our options from Snowflake's `model_parameters` and `response_format`.

    `top_p` 0 and `guardrails` false are Snowflake's defaults and stand for "not set".

    Raises:
        InvalidOptionError: `guardrails` true; no content filter is offered here.
    """
    found = dict(option_mapping(parameters) or {})
    if found.pop("guardrails", None):
        raise InvalidOptionError("guardrails = true: no content filter is offered here. Leave the option out.")
    if found.get("top_p") == 0:
        del found["top_p"]
    if response_format is not None:
        found["response_format"] = response_format
    return found


def options_column(length: int, parameters: Any, response_format: Any) -> Any:
    """[length] options as JSON text, from the columns of both."""
    columns = [one_array(c) for c in (parameters, response_format)]
    if all(is_constant(c) for c in columns):
        first = [python_values(c.slice(0, 1))[0] for c in columns]
        return pa.repeat(json.dumps(cortex_options(*first), default=str), length)
    rows = zip(*(python_values(c) for c in columns), strict=True)
    return pa.array([json.dumps(cortex_options(*row), default=str) for row in rows])


def read_flag(column: Any, name: str) -> bool:
    """The value of a BOOLEAN argument that is the same for all rows. NULL, or an argument not given, is false.

    Raises:
        InputError: The argument is no BOOLEAN, or differs by row.
    """
    values = one_array(column)
    if not (pa.types.is_boolean(values.type) or pa.types.is_null(values.type)):
        raise InputError(f"{name} is {values.type}; it must be true or false. Write {AI_COMPLETE}.")
    if not is_constant(values):
        raise InputError(f"{name} must be the same in every row.")
    return bool(len(values) and values[0].as_py())


def completion_object(model: str, structured: bool, completion: Completion) -> str | None:
    """Snowflake's JSON object of one answer: choices (or structured_output), created, model, usage."""
    if completion.error is not None or completion.text is None:
        return None
    usage = completion.usage
    if structured:
        answer: dict[str, Any] = {"structured_output": [{"raw_message": json.loads(completion.text), "type": "json"}]}
    else:
        answer = {"choices": [{"messages": completion.text}]}
    answer |= {
        "created": int(time.time()),
        "model": model,
        "usage": {
            "completion_tokens": usage.completion_tokens,
            "prompt_tokens": usage.prompt_tokens,
            "total_tokens": usage.completion_tokens + usage.prompt_tokens,
        },
    }
    return json.dumps(answer, ensure_ascii=False)


def answer_texts(answers: Answers, group: CallGroup, show_details: bool) -> Any:
    if not show_details:
        return one_array(answers.text)
    structured = bool(group.options and group.options.get("response_format"))
    objects = [completion_object(group.model, structured, c) for c in answers.completions]
    return answers.plan.scatter(pa.array(objects, pa.large_string()))


def ai_complete(session: Session, *columns: Any, lenient: bool = False) -> Any:
    """[n] large_string: the answer, or Snowflake's JSON object with `show_details`."""
    columns = fill_arguments(columns)
    if read_flag(columns[5], "return_error_details"):
        raise InputError(
            f"return_error_details changes the type of the result and needs its name. Write {AI_COMPLETE}."
        )
    details = read_flag(columns[4], "show_details")
    asked = (*columns[:2], options_column(len(columns[0]), columns[2], columns[3]))
    return answer_rows(session, asked, lambda a, g: answer_texts(a, g, details), pa.large_string(), lenient)


def try_ai_complete(session: Session, *columns: Any) -> Any:
    return ai_complete(session, *columns, lenient=True)


def ai_complete_with_error(session: Session, *columns: Any) -> Any:
    """[n] TEXT_OR_ERROR: the value or the error's message, the other NULL; both NULL for a NULL prompt."""
    columns = fill_arguments(columns)
    details, wanted = read_flag(columns[4], "show_details"), read_flag(columns[5], "return_error_details")
    asked = (*columns[:2], options_column(len(columns[0]), columns[2], columns[3]))

    def pick(answers: Answers, group: CallGroup) -> Any:
        messages = pa.array([c.error.message if wanted and c.error else None for c in answers.completions], pa.string())
        parts = [one_array(answer_texts(answers, group, details)), one_array(answers.plan.scatter(messages))]
        return pa.StructArray.from_arrays(parts, fields=list(TEXT_OR_ERROR))

    return answer_rows(session, asked, pick, TEXT_OR_ERROR)


def fill_arguments(columns: tuple[Any, ...]) -> tuple[Any, ...]:
    """All six arguments, with NULL for arguments that were not given.

    A third argument that is true or false is refused: its writer meant another argument, which needs its name.
    """
    if not 2 <= len(columns) <= 6:
        raise InputError(f"{len(columns)} arguments were given. Write {AI_COMPLETE}.")
    if len(columns) > 2 and pa.types.is_boolean(columns[2].type):
        raise InputError(f"The third argument, model_parameters, is true or false. Write {AI_COMPLETE}.")
    return (*columns, *[pa.nulls(len(columns[0]))] * (6 - len(columns)))


def refuse_clash(con: duckdb.DuckDBPyConnection) -> None:
    """Refuse a database that has a catalog named snowflake already.

    Raises:
        InputError: The database has such a catalog; the message names its file.
    """
    query = "SELECT database_name, path FROM duckdb_databases() WHERE lower(database_name) = 'snowflake'"
    with con.cursor() as cursor:
        found = cursor.execute(query).fetchone()
    if found is not None:
        raise InputError(
            f"A catalog named {found[0]!r} is open ({found[1] or 'in memory'}), and cortex=True needs the name. "
            "Attach yours under another (ATTACH '...' AS other), or register without cortex and write complete(...)."
        )


class Catalog:
    """The catalog `snowflake` of one database, shared by its cursors, and AI_COMPLETE's macros on one connection."""

    def __init__(self, con: duckdb.DuckDBPyConnection) -> None:
        self.con = con
        self.folder: tempfile.TemporaryDirectory[str] | None = None
        with con.cursor() as cursor:
            if cursor.execute("SELECT current_setting('access_mode')").fetchall() == [("read_only",)]:
                cursor.execute(f"ATTACH {sql_literal(str(self.file()))} AS snowflake (READ_ONLY)")
            else:
                cursor.execute("ATTACH ':memory:' AS snowflake")
                cursor.execute(read_sql("cortex_catalog.sql"))
        con.execute(read_sql("cortex_names.sql"))

    def file(self) -> Path:
        """The catalog as a temporary file. A read-only database cannot attach a catalog in memory."""
        self.folder = tempfile.TemporaryDirectory(prefix="complete-fn-")
        path = Path(self.folder.name) / "snowflake.duckdb"
        cortex_names = [name for name, function in FUNCTIONS.items() if function.is_cortex]
        with duckdb.connect() as builder:
            for name in ("complete", "try_complete", "count_tokens", *cortex_names):
                builder.create_function(name, lambda *columns: columns[0], None, "VARCHAR", type=ARROW)
            builder.execute(f"ATTACH {sql_literal(str(path))} AS snowflake")
            builder.execute(read_sql("cortex_catalog.sql"))
        return path

    def detach(self) -> None:
        macros = [f"DROP MACRO IF EXISTS temp.main.{name}" for name in NAMED]
        for statement in (*macros, "DETACH snowflake"):
            with contextlib.suppress(duckdb.Error):
                self.con.execute(statement)
        if self.folder is not None:
            self.folder.cleanup()


def read_sql(name: str) -> str:
    return files("complete_fn_sql").joinpath(name).read_text("utf-8")
