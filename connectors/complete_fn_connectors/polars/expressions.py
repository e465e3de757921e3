"""Polars: completion expressions, and the `.llm` namespace, which exists once this module is imported.

import polars as pl
from complete_fn_connectors.polars import complete, prompt

df.with_columns(answer=complete("demo-llama-swiftkv", prompt("Name the section: {description}")))
df.with_columns(answer=pl.col("text").llm.complete("demo-llama-swiftkv", max_tokens=20))
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa

from complete_fn.engines.base import Engine
from complete_fn.errors import InputError, InvalidOptionError
from complete_fn.execution import answers
from complete_fn.interrupts import INTERRUPTS
from complete_fn.prompts.choices import parse_choices
from complete_fn.prompts.options import parse_options
from complete_fn.prompts.templates import template_fields
from complete_fn.types import Asker
from complete_fn_connectors import functions, tasks
from complete_fn_connectors.functions import QuerySession
from complete_fn_connectors.polars.columns import Ask, answer_together, arrow_of, series_of
from complete_fn_connectors.sql_functions import FUNCTIONS, SqlFunction, functions_of

IntoExpr = pl.Expr | str


def dtype_of(kind: pa.DataType) -> pl.DataType:
    """An Arrow type as Polars has it; a map as a list of structs, as not all versions have maps."""
    if pa.types.is_struct(kind):
        return pl.Struct({field.name: dtype_of(field.type) for field in kind})
    if pa.types.is_map(kind):
        return pl.List(pl.Struct({"key": dtype_of(kind.key_type), "value": dtype_of(kind.item_type)}))
    if pa.types.is_list(kind):
        return pl.List(dtype_of(kind.value_type))
    return pl.Series(pa.array([], kind)).dtype


DETAILS = dtype_of(answers.DETAILS)

LOCK = threading.Lock()
DEFAULT: list[QuerySession] = []


def configure(
    *,
    engine: Engine | str | None = None,
    prices: Mapping[str, Any] | None = None,
    max_cost: Any = None,
    max_total_tokens: int | None = None,
    home: Path | str | None = None,
    models_file: Path | str | None = None,
    query_tag: str | None = None,
    progress: bool | None = None,
) -> QuerySession:
    """Make the default session of all expressions made from now on; returns it, for `session=` and `take_summary()`.

    Args:
        engine: URL of an OpenAI-compatible server or an `Engine`, for every model; None takes each model's own.
        prices: what `engine` takes per million tokens, like {"input": 0.15, "output": 0.6}; None takes the catalogue's.
        max_cost: never spend more in all; what it does not cover is NULL with `budget_exceeded`.
        max_total_tokens: the same for tokens, those of prompts and answers together.
        home: folder of answers and ledger; None takes COMPLETE_FN_HOME or the platform's.
        models_file: TOML over the built-in catalogue.
        query_tag: marks the ledger's lines.
        progress: show a bar; None shows one when a person is looking.

    Raises:
        InvalidOptionError: `max_cost` is no amount, `max_total_tokens` no whole number.
    """
    session = QuerySession(
        engine=engine,
        prices=prices,
        max_cost=max_cost,
        max_total_tokens=max_total_tokens,
        home=home,
        models_file=models_file,
        who=Asker(query_tag=query_tag),
        progress=progress,
    )
    with LOCK:
        DEFAULT[:] = [session]
    return session


def default_session() -> QuerySession:
    with LOCK:
        if not DEFAULT:
            DEFAULT.append(QuerySession())
        return DEFAULT[0]


def summary() -> str:
    """One line that sums up all runs of the default session since the last call of this function."""
    return default_session().take_summary()


def complete(model: str, prompt: IntoExpr, *, session: QuerySession | None = None, **options: Any) -> pl.Expr:
    """The answer of each row, String. NULL for a NULL prompt and for a row that failed (with one warning).

    Args:
        prompt: an expression or a column's name: text, `prompt(...)`, or messages (a list of structs).
        options: temperature, top_p, top_k, max_tokens, seed, stop, response_format, choices, cache, strict.

    Raises:
        UnknownModelError, InvalidOptionError: at once, not when the query runs.
    """
    return map_column(functions.complete, pl.String(), model, prompt, session, options)


def ask(model: str, prompt: IntoExpr, **options: Any) -> Ask:
    """A column for `complete_columns`. Arguments as `complete`."""
    return Ask(model, as_expression(prompt), options)


def complete_columns(*, session: QuerySession | None = None, **asks: Ask) -> pl.Expr:
    """Several columns of answers as one plan: a Struct with a String field for each name; add `.struct.unnest()`.

    Columns of equal model and options are one batch: their duplicates are merged and their prompts ordered together.
    Separate `complete` expressions of one frame reach the engine at the same time, but each as a plan of its own. An
    eager frame, or `collect(engine="in-memory")`, is planned as a whole; the streaming engine, which plain `collect()`
    takes, brings each thread's share of the rows as a plan.

    df.with_columns(complete_columns(
        section=ask("demo-llama-swiftkv", prompt("Name the section: {description}")),
        synopsis=ask("demo-llama-swiftkv", prompt("Write a one-line synopsis: {description}")),
    ).struct.unnest())

    Raises:
        UnknownModelError, InvalidOptionError: at once, not when the query runs. InputError: no column is asked for.
    """
    if not asks:
        raise InputError("complete_columns() asks for no column; write complete_columns(name=ask(model, prompt)).")
    chosen = session or default_session()
    for wanted in asks.values():
        wanted.check(chosen)
    INTERRUPTS.listen()
    dtype = pl.Struct({name: pl.String() for name in asks})

    def answer(series: pl.Series) -> pl.Series:
        if series.is_empty():
            return pl.Series(series.name, [], dtype)
        return answer_together(chosen, asks, series.struct.unnest()).to_struct(series.name)

    prompts = pl.struct([wanted.prompt.alias(name) for name, wanted in asks.items()])
    return prompts.alias("answers").map_batches(answer, return_dtype=dtype, is_elementwise=True)


def try_complete(model: str, prompt: IntoExpr, *, session: QuerySession | None = None, **options: Any) -> pl.Expr:
    """As `complete`, and NULL also where the query itself is at fault."""
    return map_column(functions.try_complete, pl.String(), model, prompt, session, options, lenient=True)


def complete_details(model: str, prompt: IntoExpr, *, session: QuerySession | None = None, **options: Any) -> pl.Expr:
    """value, error, finish_reason, usage, cost, source, scores and field_order of each row, as a Struct."""
    return map_column(functions.complete_details, DETAILS, model, prompt, session, options)


def complete_classify(
    model: str, text: IntoExpr, labels: Sequence[str], *, session: QuerySession | None = None, **options: Any
) -> pl.Expr:
    """One of the labels, String, by one token of the model.

    Args:
        labels: 2 to 128 texts.
        options: `template`, a version ('v1') or your own prompt with {text} in it; cache, strict.

    Raises:
        UnknownModelError, InvalidOptionError: at once, not when the query runs.
    """
    return task_expression(
        "complete_classify", model, {"text": text, "labels": parse_choices(labels)}, session, options
    )


def complete_classify_details(
    model: str, text: IntoExpr, labels: Sequence[str], *, session: QuerySession | None = None, **options: Any
) -> pl.Expr:
    """As `complete_classify`, with usage, cost and `scores` (each label's probability), as a Struct."""
    arguments = {"text": text, "labels": parse_choices(labels)}
    return task_expression("complete_classify_details", model, arguments, session, options)


def complete_filter(
    model: str, predicate: str, text: IntoExpr, *, session: QuerySession | None = None, **options: Any
) -> pl.Expr:
    """Whether the predicate, a text that is the same for all rows, holds for the text, Boolean."""
    arguments = {"predicate": one_text("predicate", predicate), "text": text}
    return task_expression("complete_filter", model, arguments, session, options)


def complete_sentiment(model: str, text: IntoExpr, *, session: QuerySession | None = None, **options: Any) -> pl.Expr:
    """positive, negative, neutral or mixed, String."""
    return task_expression("complete_sentiment", model, {"text": text}, session, options)


def complete_summarize(model: str, text: IntoExpr, *, session: QuerySession | None = None, **options: Any) -> pl.Expr:
    """At most three sentences, String. Options as `complete`, and `template`."""
    return task_expression("complete_summarize", model, {"text": text}, session, options)


def complete_translate(
    model: str, text: IntoExpr, language: str, *, session: QuerySession | None = None, **options: Any
) -> pl.Expr:
    """The text in another language, named in words ('French'), String. Options as `complete`, and `template`."""
    arguments = {"text": text, "language": one_text("language", language)}
    return task_expression("complete_translate", model, arguments, session, options)


def complete_extract(
    model: str,
    text: IntoExpr,
    fields: Sequence[str] | Mapping[str, str],
    *,
    session: QuerySession | None = None,
    **options: Any,
) -> pl.Expr:
    """A JSON object with a text or null for each field, String. Options as `complete`, and `template`.

    Args:
        fields: names, or questions by name.

    Raises:
        InputError: `fields` is neither.
    """
    plain = isinstance(fields, Mapping | str)  # a text is a sequence too, of its letters
    questions = tasks.questions_of(fields if plain else list(fields))
    return task_expression("complete_extract", model, {"text": text, "fields": questions}, session, options)


class Checked(Exception):
    """Ends the check of a call in which nothing is wrong. This exception never leaves this module."""


class CheckingSession:
    """Stands for a session while a call is checked: it checks model and options, and asks no model."""

    def __init__(self, session: QuerySession) -> None:
        self.session = session

    def __getattr__(self, name: str) -> Any:
        return getattr(self.session, name)

    def complete(self, model: str, prompts: Any, options: Any = None, **_: Any) -> Any:
        self.session.model(model)
        parse_options(options)
        raise Checked


def task_expression(
    name: str, model: str, arguments: Mapping[str, Any], session: QuerySession | None, options: dict[str, Any]
) -> pl.Expr:
    """A function of the table `FUNCTIONS` over a column of texts; its other arguments are the same for all rows.

    Args:
        arguments: by their names in the function's form, without the model.

    Raises:
        UnknownModelError, InvalidOptionError, InputError: at once, by a call for one row that asks nothing.
    """
    entry = FUNCTIONS[name]
    function, asked = entry.function, column_argument(entry)

    def answer(chosen: Any, model: str, texts: Any, *_: Any) -> Any:
        given = [
            texts if argument == asked else pa.repeat(pa.scalar(arguments[argument]), len(texts))
            for argument in entry.arguments[1:]
        ]
        return function(chosen, model, *given, options)

    chosen = session or default_session()
    chosen.model(one_text("model", model))
    if entry.asks:
        with suppress(Checked):
            answer(CheckingSession(chosen), model, pa.array(["any text"], pa.large_string()))
    return map_column(answer, dtype_of(entry.result), model, arguments[asked], chosen, None)


def column_argument(entry: SqlFunction) -> str:
    """The argument of a function that is a column."""
    return next(argument for argument in entry.arguments if argument in ("text", "prompt"))


def function_expression(name: str) -> Callable[..., pl.Expr]:
    """A function of the table by name, with its arguments in their order and options as keywords."""
    entry = FUNCTIONS[name]

    def make(model: str, *arguments: Any, session: QuerySession | None = None, **options: Any) -> pl.Expr:
        if len(arguments) != len(entry.arguments) - 1:
            raise InputError(f"{len(arguments) + 1} arguments were given; write {entry.form}.")
        return task_expression(name, model, dict(zip(entry.arguments[1:], arguments, strict=True)), session, options)

    return make


def count_tokens(model: str, text: IntoExpr, *, session: QuerySession | None = None) -> pl.Expr:
    """Tokens of each text by the model's own tokenizer, Int64."""
    return map_column(functions.count_tokens, pl.Int64(), model, text, session, None)


def prompt(template: str, **fields: IntoExpr) -> pl.Expr:
    """A prompt per row whose fields stay apart from the template; `{name}` takes the field or else the column.

    Raises:
        InvalidOptionError: the template has more than names in braces, or a field is given that it does not name.
    """
    names = template_fields(template)
    if unused := [f for f in fields if f not in names]:
        raise InvalidOptionError(f"The template {template!r} does not name {{{unused[0]}}}, which is given.")
    columns = {n: fields.get(n, n) for n in names}
    values = pl.struct([as_expression(c).alias(n) for n, c in columns.items()]) if columns else pl.lit(None)
    return pl.struct(template=pl.lit(template), fields=values).alias("prompt")


def one_text(argument: str, given: Any) -> str:
    """Raises InputError: The argument is no text; an expression could differ by row."""
    if not isinstance(given, str):
        kind = type(given).__name__
        raise InputError(f"The {argument} is of type {kind}; it must be one text for all rows. Only prompts differ.")
    return given


def as_expression(column: IntoExpr) -> pl.Expr:
    return pl.col(column) if isinstance(column, str) else column


def map_column(
    function: Callable[..., Any],
    dtype: pl.DataType,
    model: str,
    column: IntoExpr,
    session: QuerySession | None,
    options: dict[str, Any] | None,
    lenient: bool = False,
) -> pl.Expr:
    """`function` over whole columns; in the streaming engine over its chunks."""
    chosen = session or default_session()
    if not lenient:
        chosen.model(one_text("model", model))
        parse_options(options)
    INTERRUPTS.listen()

    def answer(series: pl.Series) -> pl.Series:
        if series.is_empty():
            return pl.Series(series.name, [], dtype)
        values = function(chosen, model, arrow_of(series), *([] if options is None else [options]))
        return series_of(series.name, values, dtype)

    return as_expression(column).map_batches(answer, return_dtype=dtype, is_elementwise=True)


@pl.api.register_expr_namespace("llm")
class Llm:
    """`pl.col("text").llm`: the functions of this module with the expression as the prompt."""

    def __init__(self, expression: pl.Expr) -> None:
        self.expression = expression

    def complete(self, model: str, **options: Any) -> pl.Expr:
        return complete(model, self.expression, **options)

    def try_complete(self, model: str, **options: Any) -> pl.Expr:
        return try_complete(model, self.expression, **options)

    def complete_details(self, model: str, **options: Any) -> pl.Expr:
        return complete_details(model, self.expression, **options)

    def count_tokens(self, model: str, *, session: QuerySession | None = None) -> pl.Expr:
        return count_tokens(model, self.expression, session=session)

    def classify(self, model: str, labels: Sequence[str], **options: Any) -> pl.Expr:
        return complete_classify(model, self.expression, labels, **options)

    def filter(self, model: str, predicate: str, **options: Any) -> pl.Expr:
        return complete_filter(model, predicate, self.expression, **options)

    def __getattr__(self, name: str) -> Callable[..., pl.Expr]:
        full = f"complete_{name}"
        if full not in functions_of(cortex=False):
            raise AttributeError(f"The namespace llm has no function {name!r}.")
        before = FUNCTIONS[full].arguments.index(column_argument(FUNCTIONS[full])) - 1

        def make(model: str, *others: Any, **options: Any) -> pl.Expr:
            return function_expression(full)(model, *others[:before], self.expression, *others[before:], **options)

        return make
