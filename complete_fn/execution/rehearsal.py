"""A rehearsal writes made-up answers to a result table and takes them back, before real answers are paid for."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pyarrow as pa

from complete_fn.errors import ROW_ERRORS
from complete_fn.execution.answers import DETAILS
from complete_fn.rows.databases import RowDatabase
from complete_fn.rows.result_tables import result_columns

# What a table must take: a row that has everything, and one that has nothing, as an empty prompt's has.
MADE_UP = {
    "value": "text",
    "error": {"code": max(ROW_ERRORS, key=len), "message": "text"},
    "finish_reason": "length",
    "usage": {"prompt_tokens": 1, "cached_tokens": 1, "completion_tokens": 1},
    "cost": Decimal("0.000000001"),
    "source": "duplicate",
}


def rehearse(database: RowDatabase, table: str, key: str, keys: Any, column: str, with_details: bool) -> None:
    """Refuse a table that cannot take the answers: of other types, without their columns, or not ours to write.

    Args:
        keys: the keys of the first rows; only the first is used.

    Raises:
        InputError: The table cannot take the answers.
        DatabaseAwayError: The database does not answer.
    """
    for made_up in (MADE_UP, None):
        details = pa.array([made_up], DETAILS)
        value = pa.array([made_up and made_up["value"]], pa.large_string())
        new = result_columns(column, {column: value, f"{column}_details": details}, with_details)
        database.rehearse(table, key, pa.table({key: keys[:1], **new}))
