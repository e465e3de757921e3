"""Polars: expressions, and the namespace `.llm` of columns, which importing this registers."""

from collections.abc import Callable
from typing import Any

from complete_fn_connectors.polars.expressions import (
    ask,
    complete,
    complete_classify,
    complete_classify_details,
    complete_columns,
    complete_details,
    complete_extract,
    complete_filter,
    complete_sentiment,
    complete_summarize,
    complete_translate,
    configure,
    count_tokens,
    function_expression,
    prompt,
    summary,
    try_complete,
)
from complete_fn_connectors.sql_functions import functions_of

__all__ = [
    "ask",
    "complete",
    "complete_classify",
    "complete_classify_details",
    "complete_columns",
    "complete_details",
    "complete_extract",
    "complete_filter",
    "complete_sentiment",
    "complete_summarize",
    "complete_translate",
    "configure",
    "count_tokens",
    "prompt",
    "summary",
    "try_complete",
]


def __getattr__(name: str) -> Callable[..., Any]:
    """A function of the table that has no signature of its own here."""
    if name in functions_of(cortex=False):
        return function_expression(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
