"""Polars: expressions, and the namespace `.llm` of columns, which importing this registers."""

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
    prompt,
    summary,
    try_complete,
)

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
