"""The semantic functions fill a versioned prompt of `complete_fn_sql/tasks.toml` and ask it as `complete` does."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable, Mapping
from functools import cache
from importlib.resources import files
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from complete_fn.errors import InputError, InvalidOptionError
from complete_fn.execution.answers import DETAILS, Answers
from complete_fn.prompts.templates import template_fields
from complete_fn.session import Session
from complete_fn.text import as_text
from complete_fn_connectors.arrow import is_constant, is_list, is_text, one_array, option_mapping, python_values
from complete_fn_connectors.functions import answer_rows
from complete_fn_connectors.sql_functions import FUNCTIONS

SENTIMENTS = ("positive", "negative", "neutral", "mixed")
YES_NO = ("yes", "no")
VERSION = re.compile(r"v\d+")


def form_of(task: str) -> str:
    """How the function of a task is called. A prompt without a function, such as `holds`, gives its own name."""
    function = FUNCTIONS.get(f"complete_{task}")
    return task if function is None else function.form


@cache
def templates(task: str) -> dict[str, str]:
    """The prompts of a task by version, the newest last."""
    text = files("complete_fn_sql").joinpath("tasks.toml").read_text("utf-8")
    return {version: prompt.lstrip("\n") for version, prompt in tomllib.loads(text)[task].items()}


def template_of(task: str, given: Any) -> str:
    """The prompt of a task: the newest one, the version that `given` names, or `given` itself with `{text}` in it.

    Raises:
        InvalidOptionError: There is no such version, or the template lacks {text} or names something else.
    """
    known = templates(task)
    if given is None:
        return list(known.values())[-1]
    if isinstance(given, str) and given in known:
        return known[given]
    if not isinstance(given, str) or VERSION.fullmatch(given):
        raise InvalidOptionError(
            f"template = {given!r} is no version of {task!r}. There are {', '.join(known)}; or write your own with "
            "{text} in it."
        )
    allowed = {name for prompt in known.values() for name in template_fields(prompt)}
    named = set(template_fields(given))
    if "text" not in named or not named <= allowed:
        fields = ", ".join(f"{{{name}}}" for name in sorted(allowed - {"text"})) or "nothing else"
        raise InvalidOptionError(f"template = {given!r} must name {{text}}, and may name {fields}.")
    return given


def ask_task(
    session: Session,
    task: str,
    model: Any,
    fields: Mapping[str, Any],
    own: Any,
    options: Any,
    pick: Callable[[Answers], Any],
    kind: Any,
) -> Any:
    """[n] values of `kind`: the task's prompt, filled with the fields' columns and asked as `complete` asks.

    Args:
        model: a column of names or one name.
        own: [n] or [1] mappings, the options that the task itself sets; None in a row that is not asked.
        options: a column of the caller's options or one mapping; `template` is the task's, the rest `complete`'s.
    """
    n = len(fields["text"])
    constant = len(own) == 1 and (options is None or isinstance(options, Mapping) or is_constant(one_array(options)))
    chosen = [
        options_of(task, values, given) for values, given in zip(*rows_of(own, options, n, constant), strict=True)
    ]
    if constant:
        chosen *= max(n, 1)
    template = pa.array([None if c is None else c[0] for c in chosen[:n]], pa.string())
    asked = pa.array([None if c is None else c[1] for c in chosen[:n]], pa.string())
    texts = [as_text(column, name) for name, column in fields.items()]
    prompts = pa.StructArray.from_arrays(
        [template, pa.StructArray.from_arrays(texts, list(fields))], ["template", "fields"], mask=pc.is_null(template)
    )
    models = pa.repeat(pa.scalar(model), n) if isinstance(model, str) else model
    return answer_rows(session, (models, prompts, asked), lambda answers, _: pick(answers), kind)


def rows_of(own: Any, options: Any, n: int, constant: bool) -> tuple[list[Any], list[Any]]:
    """The options of the task together with the caller's: once for all rows if they are `constant`, else row by row."""
    plain = options is None or isinstance(options, Mapping)
    if constant:
        return list(own), [options] if plain else [*python_values(one_array(options)[:1]), None][:1]
    given = [options] * n if plain else python_values(one_array(options))
    return (list(own) * n if len(own) == 1 else list(own)), given


def options_of(task: str, own: Mapping[str, Any] | None, given: Any) -> tuple[str, str] | None:
    """(template, options as JSON) of a row."""
    if own is None:
        return None
    found = dict(option_mapping(given) or {})
    template = template_of(task, found.pop("template", None))
    for name in (*own, "reorder_fields"):
        if found.get(name) is not None:
            raise InvalidOptionError(f"{name} = {found[name]!r}: {form_of(task)} sets {name} itself.")
    return template, json.dumps({**found, **own}, default=str)


def split_options(task: str, columns: tuple[Any, ...]) -> tuple[Any, ...]:
    """The columns with the options as the last one; None stands for options that were not given.

    Raises:
        InputError: There are too few or too many columns.
    """
    count = len(FUNCTIONS[f"complete_{task}"].arguments)
    if len(columns) not in (count, count + 1):
        raise InputError(f"{len(columns)} arguments were given; write {form_of(task)}.")
    return (*columns, *([None] if len(columns) == count else []))


def text_argument(column: Any, task: str, name: str) -> Any:
    """Raises InputError: it is no text."""
    values = one_array(column)
    if not (is_text(values.type) or pa.types.is_null(values.type)):
        raise InputError(f"{form_of(task)}: {name} is {values.type}. Cast it: CAST(x AS VARCHAR).")
    return values.cast(pa.large_string())


def repeat_single(values: Any, n: int) -> Any:
    """[n] values: a single value is repeated."""
    return pa.repeat(values[0], n) if len(values) == 1 else values


def value(answers: Answers) -> Any:
    return answers.text


def details(answers: Answers) -> Any:
    return answers.details


def label_lists(column: Any) -> list[Any]:
    """[n] or, where all rows have the same, [1] lists of labels, texts or {label, description}; None for NULL.

    Raises:
        InputError: The labels are no list of these.
    """
    values = one_array(column)
    if pa.types.is_null(values.type):
        return [None]
    inner = values.type.value_type if is_list(values.type) else values.type
    structs = pa.types.is_struct(inner) and {"label"} <= set(inner.names) <= {"label", "description"}
    if not is_list(values.type) or not (is_text(inner) or pa.types.is_null(inner) or structs):
        raise InputError(f"{form_of('classify')}: labels is {values.type}. Write them as a list: ['bug', 'question'].")
    return list((values[:1] if is_constant(values) else values).to_pylist())


def name_of(label: Any) -> Any:
    return label["label"] if isinstance(label, Mapping) else label


def label_line(label: Any) -> str:
    """A label as the prompt lists it."""
    more = label.get("description") if isinstance(label, Mapping) else None
    return f"{name_of(label)} ({more})" if more else str(name_of(label))


def classification(session: Session, columns: tuple[Any, ...], pick: Callable[[Answers], Any], kind: Any) -> Any:
    model, text, labels, options = split_options("classify", columns)
    text = text_argument(text, "classify", "text")
    chosen = label_lists(labels)
    listed = pa.array([None if c is None else ", ".join(map(label_line, c)) for c in chosen], pa.large_string())
    fields = {"labels": repeat_single(listed, len(text)), "text": text}
    own = [None if c is None else {"choices": list(map(name_of, c))} for c in chosen]
    return ask_task(session, "classify", model, fields, own, options, pick, kind)


def complete_classify(session: Session, *columns: Any) -> Any:
    """[n] large_string: one of the labels, by one token of the model.

    Raises:
        InvalidOptionError: The labels cannot be used (see `choices.parse_choices`).
        InputError: There are too few or too many arguments, or one has a wrong type.
    """
    return classification(session, columns, value, pa.large_string())


def complete_classify_details(session: Session, *columns: Any) -> Any:
    """[n] DETAILS; `scores` has each label's probability."""
    return classification(session, columns, details, DETAILS)


def is_yes(answers: Answers) -> Any:
    return pc.equal(answers.text, "yes")


def complete_filter(session: Session, *columns: Any) -> Any:
    """[n] bool: whether the predicate holds for the text; NULL for a NULL in either and for a row that failed."""
    model, predicate, text, options = split_options("filter", columns)
    fields = {
        "predicate": text_argument(predicate, "filter", "predicate"),
        "text": text_argument(text, "filter", "text"),
    }
    return ask_task(session, "filter", model, fields, [{"choices": YES_NO}], options, is_yes, pa.bool_())


def complete_sentiment(session: Session, *columns: Any) -> Any:
    """[n] large_string: positive, negative, neutral or mixed."""
    model, text, options = split_options("sentiment", columns)
    fields = {"text": text_argument(text, "sentiment", "text")}
    return ask_task(session, "sentiment", model, fields, [{"choices": SENTIMENTS}], options, value, pa.large_string())


def complete_summarize(session: Session, *columns: Any) -> Any:
    """[n] large_string: at most three sentences."""
    model, text, options = split_options("summarize", columns)
    fields = {"text": text_argument(text, "summarize", "text")}
    return ask_task(session, "summarize", model, fields, [{}], options, value, pa.large_string())


def complete_translate(session: Session, *columns: Any) -> Any:
    """[n] large_string: the text in another language, named in words ('French')."""
    model, text, target, options = split_options("translate", columns)
    text = text_argument(text, "translate", "text")
    source = pa.repeat(pa.scalar("its own language", pa.large_string()), len(text))
    fields = {"source": source, "target": text_argument(target, "translate", "language"), "text": text}
    return ask_task(session, "translate", model, fields, [{}], options, value, pa.large_string())


def questions_of(fields: Any) -> dict[str, str]:
    """Question by name, from a list of names or a mapping.

    Raises:
        InputError: The fields are neither, or there is none.
    """
    if isinstance(fields, list) and all(isinstance(name, str) for name in fields):
        fields = {name: f"What is the {name}?" for name in fields}
    if not isinstance(fields, Mapping) or not fields or not all(isinstance(q, str) for q in fields.values()):
        raise InputError(
            f"{form_of('extract')}: fields is {fields!r}. Write names, ['author', 'year'], or questions, "
            "{'author': 'Who wrote it?'}."
        )
    return dict(fields)


def extraction_of(fields: Any) -> tuple[str, dict[str, Any]]:
    """(the questions as lines, the schema of the answer)."""
    questions = questions_of(fields)
    one = {"type": ["string", "null"]}
    schema = {
        "type": "object",
        "properties": dict.fromkeys(questions, one),
        "required": list(questions),
        "additionalProperties": False,
    }
    return "\n".join(f"{name}: {question}" for name, question in questions.items()), {"response_format": schema}


def complete_extract(session: Session, *columns: Any) -> Any:
    """[n] large_string: a JSON object with a text or null for each field."""
    model, text, asked, options = split_options("extract", columns)
    text = text_argument(text, "extract", "text")
    values = one_array(asked)
    wanted = python_values(values[:1] if is_constant(values) else values)
    found = [None if w is None else extraction_of(w) for w in wanted]
    listed = pa.array([None if f is None else f[0] for f in found], pa.large_string())
    fields = {"questions": repeat_single(listed, len(text)), "text": text}
    own = [None if f is None else f[1] for f in found]
    return ask_task(session, "extract", model, fields, own, options, value, pa.large_string())
