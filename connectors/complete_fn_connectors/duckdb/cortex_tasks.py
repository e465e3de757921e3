"""Snowflake's task functions, which name no model: AI_CLASSIFY, AI_FILTER, AI_SENTIMENT, AI_TRANSLATE, AI_EXTRACT and
the older SNOWFLAKE.CORTEX ones. The registration's `task_model` answers them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pyarrow as pa

from complete_fn.errors import InputError
from complete_fn.execution.answers import Answers
from complete_fn.types import Completion
from complete_fn_connectors import tasks
from complete_fn_connectors.arrow import is_constant, one_array, option_mapping, prompt_column, python_values
from complete_fn_connectors.functions import QuerySession
from complete_fn_connectors.sql_functions import FUNCTIONS


def model_of(session: QuerySession, name: str) -> str:
    """The registration's `task_model`.

    Raises:
        InputError: The registration has no `task_model`.
    """
    if session.task_model is None:
        raise InputError(
            f"{name} names no model: register(con, cortex=True, task_model='llama-8b-swiftkv') says which one answers."
        )
    return session.task_model


def check_count(name: str, columns: tuple[Any, ...], *counts: int) -> None:
    if len(columns) not in counts:
        raise InputError(f"{len(columns)} arguments were given; write {FUNCTIONS[name].form}.")


def as_object(make: Callable[[Completion], Any]) -> Callable[[Answers], Any]:
    """Answers as JSON texts; NULL for a row without one."""

    def pick(answers: Answers) -> Any:
        found = [None if c.error or c.text is None else json.dumps(make(c)) for c in answers.completions]
        return answers.plan.scatter(pa.array(found, pa.large_string()))

    return pick


def classify(session: QuerySession, columns: tuple[Any, ...], make: Callable[[Completion], Any]) -> Any:
    check_count("ai_classify", columns, 2, 3)
    for config in python_values(one_array(columns[2])) if len(columns) == 3 else []:
        given = {k: v for k, v in (option_mapping(config) or {}).items() if v is not None}
        if given.pop("output_mode", "single") != "single" or given:
            raise InputError(f"The configuration {config!r} is not supported; write {FUNCTIONS['ai_classify'].form}.")
    asked = (model_of(session, "AI_CLASSIFY"), *columns[:2])
    return tasks.classification(session, asked, as_object(make), pa.large_string())


def ai_classify(session: QuerySession, *columns: Any) -> Any:
    """[n] large_string: Snowflake's object, {"labels": ["..."]}."""
    return classify(session, columns, lambda c: {"labels": [c.text]})


def classify_text(session: QuerySession, *columns: Any) -> Any:
    """[n] large_string: the older {"label": "..."}."""
    return classify(session, columns, lambda c: {"label": c.text})


def ai_filter(session: QuerySession, *columns: Any) -> Any:
    """[n] bool: whether the statement, or the question of a PROMPT, is answered with yes."""
    check_count("ai_filter", columns, 1)
    fields = {"text": prompt_column(columns[0])}
    own = [{"choices": tasks.YES_NO}]
    return tasks.ask_task(session, "holds", model_of(session, "AI_FILTER"), fields, own, None, tasks.is_yes, pa.bool_())


def sentiments(session: QuerySession, columns: tuple[Any, ...], pick: Callable[[Answers], Any], kind: Any) -> Any:
    check_count("ai_sentiment", columns, 1)
    fields = {"text": tasks.text_argument(columns[0], "sentiment", "text")}
    own = [{"choices": tasks.SENTIMENTS}]
    return tasks.ask_task(session, "sentiment", model_of(session, "AI_SENTIMENT"), fields, own, None, pick, kind)


def ai_sentiment(session: QuerySession, *columns: Any) -> Any:
    """[n] large_string: Snowflake's object with the overall sentiment."""
    pick = as_object(lambda c: {"categories": [{"name": "overall", "sentiment": c.text}]})
    return sentiments(session, columns, pick, pa.large_string())


def sentiment_score(answers: Answers) -> Any:
    """[n] double: probability of positive less that of negative; NULL where the engine gives no scores."""
    found = [c.scores and (c.scores["positive"] or 0.0) - (c.scores["negative"] or 0.0) for c in answers.completions]
    return answers.plan.scatter(pa.array(found, pa.float64()))


def cortex_sentiment(session: QuerySession, *columns: Any) -> Any:
    """[n] double: the older score from -1 (negative) to 1 (positive)."""
    return sentiments(session, columns, sentiment_score, pa.float64())


def ai_translate(session: QuerySession, *columns: Any) -> Any:
    """[n] large_string. An empty source language means the text's own."""
    check_count("ai_translate", columns, 3)
    text, source, target = (tasks.text_argument(c, "translate", "an argument") for c in columns)
    named = pa.array([s if s is None or s.strip() else "its own language" for s in source.to_pylist()])
    fields = {"source": named.cast(pa.large_string()), "target": target, "text": text}
    model = model_of(session, "AI_TRANSLATE")
    return tasks.ask_task(session, "translate", model, fields, [{}], None, tasks.value, pa.large_string())


def ai_extract(session: QuerySession, *columns: Any) -> Any:
    """[n] large_string: Snowflake's object, {"error": null, "response": {...}}."""
    check_count("ai_extract", columns, 2)
    if not is_constant(one_array(columns[1])):
        raise InputError("AI_EXTRACT: responseFormat must be the same in every row.")
    text = tasks.text_argument(columns[0], "extract", "text")
    first = python_values(one_array(columns[1])[:1])[0]
    questions, own = tasks.extraction_of(option_mapping(first) if isinstance(first, str) else first)
    fields = {"questions": pa.repeat(pa.scalar(questions, pa.large_string()), len(text)), "text": text}
    pick = as_object(lambda c: {"error": None, "response": json.loads(c.text or "null")})
    return tasks.ask_task(
        session, "extract", model_of(session, "AI_EXTRACT"), fields, [own], None, pick, pa.large_string()
    )


def cortex_summarize(session: QuerySession, *columns: Any) -> Any:
    check_count("cortex_summarize", columns, 1)
    return tasks.complete_summarize(session, model_of(session, "SUMMARIZE"), *columns)
