"""The functions that ask a model, in one table: DuckDB, Polars and the documentation read it.

A new function is a file with `function(session, *columns)` over Arrow columns, and one `add` here. DuckDB has it from
the next `register` on, `sql` plans its calls, and Polars has it as an expression and in the namespace `.llm`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from complete_fn.execution.answers import DETAILS
from complete_fn.registry import Table, resolve
from complete_fn_connectors.arrow import PROMPT

TEXT, TRUTH, COUNT, NUMBER = pa.large_string(), pa.bool_(), pa.int64(), pa.float64()
TEXT_OR_ERROR = pa.struct([("value", TEXT), ("error", pa.string())])


@dataclass(frozen=True)
class SqlFunction:
    """A function as SQL and Polars have it.

    Attributes:
        target: `module:name` of what answers, called as function(session, *columns): Arrow columns in, one out.
        form: how SQL writes the call; messages and the documentation show it.
        result: the type of the values.
        asks: whether it asks a model, so that `sql` plans its calls.
        is_cortex: one of Snowflake's functions, which `register(con, cortex=True)` adds.
    """

    target: str
    form: str
    result: pa.DataType
    asks: bool = True
    is_cortex: bool = False

    @property
    def function(self) -> Callable[..., Any]:
        return resolve(self.target)

    @property
    def arguments(self) -> tuple[str, ...]:
        """The arguments that each call has, by their names in the form."""
        listed = re.sub(r" ?\[.*\]", "", self.form[self.form.index("(") + 1 : self.form.rindex(")")])
        return tuple(listed.split(", "))


def functions_of(cortex: bool) -> dict[str, SqlFunction]:
    """The functions of a registration, by name."""
    return {name: function for name, function in FUNCTIONS.items() if cortex or not function.is_cortex}


HERE = "complete_fn_connectors"
FUNCTIONS: Table[SqlFunction] = Table("function")
FUNCTIONS.add("complete", SqlFunction(f"{HERE}.functions:complete", "complete(model, prompt [, options])", TEXT))
FUNCTIONS.add(
    "try_complete", SqlFunction(f"{HERE}.functions:try_complete", "try_complete(model, prompt [, options])", TEXT)
)
FUNCTIONS.add(
    "complete_details",
    SqlFunction(f"{HERE}.functions:complete_details", "complete_details(model, prompt [, options])", DETAILS),
)
FUNCTIONS.add("prompt", SqlFunction(f"{HERE}.functions:prompt", "prompt(template, {fields})", PROMPT, asks=False))
FUNCTIONS.add(
    "count_tokens", SqlFunction(f"{HERE}.functions:count_tokens", "count_tokens(model, text)", COUNT, asks=False)
)
FUNCTIONS.add(
    "complete_classify",
    SqlFunction(f"{HERE}.tasks:complete_classify", "complete_classify(model, text, labels [, options])", TEXT),
)
FUNCTIONS.add(
    "complete_classify_details",
    SqlFunction(
        f"{HERE}.tasks:complete_classify_details",
        "complete_classify_details(model, text, labels [, options])",
        DETAILS,
    ),
)
FUNCTIONS.add(
    "complete_filter",
    SqlFunction(f"{HERE}.tasks:complete_filter", "complete_filter(model, predicate, text [, options])", TRUTH),
)
FUNCTIONS.add(
    "complete_sentiment",
    SqlFunction(f"{HERE}.tasks:complete_sentiment", "complete_sentiment(model, text [, options])", TEXT),
)
FUNCTIONS.add(
    "complete_summarize",
    SqlFunction(f"{HERE}.tasks:complete_summarize", "complete_summarize(model, text [, options])", TEXT),
)
FUNCTIONS.add(
    "complete_translate",
    SqlFunction(f"{HERE}.tasks:complete_translate", "complete_translate(model, text, language [, options])", TEXT),
)
FUNCTIONS.add(
    "complete_extract",
    SqlFunction(f"{HERE}.tasks:complete_extract", "complete_extract(model, text, fields [, options])", TEXT),
)

# Snowflake's names. The older SNOWFLAKE.CORTEX.* are macros of `cortex_catalog.sql` around these.
AI_COMPLETE = (
    "AI_COMPLETE(model, prompt [, model_parameters, response_format, show_details, return_error_details]); "
    "in a cursor write the arguments by position"
)
CLASSIFY = "AI_CLASSIFY(input, categories [, {'output_mode': 'single'}])"


def add_cortex(name: str, target: str, form: str, result: pa.DataType) -> None:
    FUNCTIONS.add(name, SqlFunction(f"{HERE}.duckdb.{target}", form, result, is_cortex=True))


add_cortex("ai_complete", "cortex:ai_complete", AI_COMPLETE, TEXT)
add_cortex("try_ai_complete", "cortex:try_ai_complete", AI_COMPLETE, TEXT)
add_cortex("ai_complete_with_error", "cortex:ai_complete_with_error", AI_COMPLETE, TEXT_OR_ERROR)
add_cortex("ai_classify", "cortex_tasks:ai_classify", CLASSIFY, TEXT)
add_cortex("ai_filter", "cortex_tasks:ai_filter", "AI_FILTER(text or PROMPT('... {0}', column))", TRUTH)
add_cortex("ai_sentiment", "cortex_tasks:ai_sentiment", "AI_SENTIMENT(text)", TEXT)
add_cortex("ai_translate", "cortex_tasks:ai_translate", "AI_TRANSLATE(text, source_language, target_language)", TEXT)
add_cortex("ai_extract", "cortex_tasks:ai_extract", "AI_EXTRACT(text, responseFormat)", TEXT)
add_cortex("cortex_classify_text", "cortex_tasks:classify_text", CLASSIFY, TEXT)
add_cortex("cortex_sentiment", "cortex_tasks:cortex_sentiment", "SNOWFLAKE.CORTEX.SENTIMENT(text)", NUMBER)
add_cortex("cortex_summarize", "cortex_tasks:cortex_summarize", "SNOWFLAKE.CORTEX.SUMMARIZE(text)", TEXT)
