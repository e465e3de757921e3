"""JSON that stays one line whatever reads it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

# JSON lets them stand in strings; str.splitlines, and so many a reader of JSONL or of events, ends a line there.
LINE_ENDS = {ord(c): f"\\u{ord(c):04x}" for c in "\x85\u2028\u2029"}


def json_line(value: Any, default: Callable[[Any], Any] | None = None, allow_nan: bool = True) -> str:
    """`value` as JSON without a character that ends a line; all others as they are.

    Raises:
        ValueError: it has a NaN or an infinity, and those are not allowed.
    """
    return json.dumps(value, ensure_ascii=False, default=default, allow_nan=allow_nan).translate(LINE_ENDS)
