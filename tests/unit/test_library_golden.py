"""What users of the library import and call, kept in tests/golden/library: names, signatures, errors, SQL functions."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import duckdb
import polars as pl

import complete_fn
from complete_fn import errors
from complete_fn_connectors import duckdb as duckdb_connector
from complete_fn_connectors import polars as polars_connector
from complete_fn_connectors.duckdb.job_functions import register_jobs
from tests.golden_files import check_golden, check_names

DUCKDB = ("register", "sql", "explain", "estimate", "registration_of")
POLARS = (
    *("configure", "summary", "complete", "try_complete", "complete_details", "complete_columns", "ask", "prompt"),
    *("complete_classify", "complete_classify_details", "complete_filter", "complete_sentiment", "complete_summarize"),
    *("complete_translate", "complete_extract", "count_tokens"),
)
# What users call of the classes; their other methods are for the library itself.
MEMBERS = {
    "Answers": ("text", "details"),
    "Client": ("submit", "upload", "job", "jobs", "close"),
    "Completion": ("failed",),
    "Engine": ("stream", "count_tokens", "close"),
    "EchoEngine": ("stream", "complete", "count_tokens", "close"),
    "Explanation": ("rounds",),
    "Llm": ("complete", "try_complete", "complete_details", "count_tokens", "classify", "filter"),
    "QueryEstimate": ("price", "seconds"),
    "QuerySession": ("take_summary",),
    "Registration": ("summary", "interrupt", "close"),
    "RemoteJob": ("state", "wait", "results", "download", "cancel", "rerun", "deliver", "delete"),
    "SamplingParams": ("greedy",),
    "Session": ("complete", "estimate", "count_tokens", "end_job", "close"),
    "Summary": ("line",),
}
GIVEN = ("Answers", "Llm", "Registration", "RemoteJob")  # users get them and make none


class Plain(str):
    """An annotation that is shown without quotes."""

    __repr__ = str.__str__


def signature(name: str, found: Any) -> str:
    """One line: the name and its arguments, without the modules where their types are."""
    given = inspect.signature(found)
    parameters = [p.replace(annotation=plain(p.annotation)) for p in given.parameters.values()]
    return f"{name}{given.replace(parameters=parameters, return_annotation=plain(given.return_annotation))}"


def plain(annotation: Any) -> Any:
    if annotation is inspect.Signature.empty or annotation is None:
        return annotation
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return Plain(re.sub(r"\bcomplete_fn\w*(\.\w+)*\.(?=\w)", "", text))


def of_class(found: type, name: str = "") -> Iterator[str]:
    """A class with its bases, its constructor where that is ours, and what users call of it."""
    name = name or found.__name__
    bases = ", ".join(base.__name__ for base in found.__mro__[1:-1] if base.__name__ not in ("Protocol", "Generic"))
    own = found.__name__ not in GIVEN and str(getattr(found.__init__, "__module__", "")).startswith("complete_fn")
    yield (signature(name, found) if own else name) + (f" is {bases}" if bases else "")
    for member in MEMBERS.get(found.__name__, ()):
        value = inspect.getattr_static(found, member)
        getter = getattr(value, "fget", None) or getattr(value, "func", None)  # of a property, of a cached one
        if getter is not None:
            yield f"  {member}: {plain(inspect.signature(getter).return_annotation)!r}"
        elif callable(getattr(found, member)):
            yield f"  {signature(member, getattr(found, member))}"


def result_of(function: Any) -> type:
    """The class of what a function gives."""
    found: type = get_type_hints(function)["return"]
    return found


def page(lines: Iterator[str]) -> str:
    return "\n".join(lines) + "\n"


def test_the_names_of_the_package_are_what_they_were(tmp_path: Path) -> None:
    def lines() -> Iterator[str]:
        for name in complete_fn.__all__:
            yield from of_class(getattr(complete_fn, name), f"complete_fn.{name}")
        yield from of_class(result_of(complete_fn.Client.job))
        yield from of_class(result_of(complete_fn.Session.complete))
        yield from of_class(type(complete_fn.Session(home=tmp_path).summary))

    assert complete_fn.__all__ == sorted(complete_fn.__all__)
    check_golden("library/complete_fn.txt", page(lines()))


def test_the_duckdb_connector_is_what_it_was() -> None:
    def lines() -> Iterator[str]:
        for name in DUCKDB:
            yield signature(f"complete_fn_connectors.duckdb.{name}", getattr(duckdb_connector, name))
        yield signature("register_jobs", register_jobs)
        for name in ("register", "explain", "estimate"):
            yield from of_class(result_of(getattr(duckdb_connector, name)))

    check_golden("library/duckdb.txt", page(lines()))


def test_the_polars_connector_is_what_it_was() -> None:
    def lines() -> Iterator[str]:
        for name in POLARS:
            yield signature(f"complete_fn_connectors.polars.{name}", getattr(polars_connector, name))
        yield from of_class(result_of(polars_connector.configure))
        yield from of_class(type(pl.col("x").llm), "polars.Expr.llm")  # type: ignore[attr-defined]

    check_golden("library/polars.txt", page(lines()))


def test_the_sql_functions_are_what_they_were(tmp_path: Path) -> None:
    """Those that stand for a call while `sql` plans a query are not listed."""
    query = "SELECT database_name, function_name, function_type, parameters, return_type FROM duckdb_functions()"

    def lines() -> Iterator[str]:
        for cortex in (False, True):
            with duckdb.connect(":memory:") as con:
                before = set(map(str, con.execute(query).fetchall()))
                duckdb_connector.register(con, home=tmp_path, cortex=cortex, progress=False)
                yield f"register(con, cortex={cortex})"
                found = [row for row in con.execute(query).fetchall() if str(row) not in before]
                for database, name, kind, parameters, gives in sorted(found, key=str):
                    if not name.startswith("complete_fn_"):
                        form = name if kind == "scalar" else f"{name}({', '.join(parameters)})"
                        yield f"  {database} {kind} {form}" + (f" -> {gives.replace(chr(34), '')}" if gives else "")

    check_golden("library/sql_functions.txt", page(lines()))


def test_the_errors_are_what_they_were() -> None:
    def tree(kind: type[errors.CompleteError], depth: int) -> Iterator[str]:
        again = ", try again" if kind.retryable else ""
        yield f"{'  ' * depth}{kind.__name__}: {kind.code}, {kind.status}{again}: {kind()}"
        for under in sorted(kind.__subclasses__(), key=lambda found: found.__name__):
            if under.__module__ == kind.__module__:  # others' are private
                yield from tree(under, depth + 1)

    def lines() -> Iterator[str]:
        yield from tree(complete_fn.CompleteError, 0)
        yield ""
        yield from (f"{code}: {meaning}" for code, meaning in errors.ROW_ERRORS.items())

    check_golden("library/errors.txt", page(lines()))


def test_every_golden_file_has_its_test() -> None:
    check_names("library/*.txt", [f"{n}.txt" for n in ("complete_fn", "duckdb", "polars", "sql_functions", "errors")])
