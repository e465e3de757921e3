"""JSON that stays one line whatever reads it."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Any

import pyarrow as pa

from complete_fn.text import to_texts

# JSON lets them stand in strings; str.splitlines, and so many a reader of JSONL or of events, ends a line there.
LINE_ENDS = {ord(c): f"\\u{ord(c):04x}" for c in "\x85\u2028\u2029"}


def json_line(value: Any, default: Callable[[Any], Any] | None = None, allow_nan: bool = True) -> str:
    """`value` as JSON without a character that ends a line; all others as they are.

    Raises:
        ValueError: it has a NaN or an infinity, and those are not allowed.
    """
    return json.dumps(value, ensure_ascii=False, default=default, allow_nan=allow_nan).translate(LINE_ENDS)


UNITS = ("s", "ms", "us", "ns")


def json_values(column: Any) -> list[str]:
    """Each value as JSON; text that is not UTF-8 keeps its bytes as escaped lone surrogates."""
    text = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
    return [as_json(v) for v in (to_texts(column) if text else values_of(column))]


def values_of(column: Any) -> list[Any]:
    """Python's values; times that its types cannot hold as ISO 8601, durations as seconds."""
    try:
        return list(column.to_pylist(maps_as_pydicts="lossy"))
    except (ValueError, OverflowError):
        return [value_of(scalar) for scalar in column]


def value_of(scalar: Any) -> Any:
    kind = scalar.type
    if not scalar.is_valid:
        return None
    if pa.types.is_dictionary(kind):
        return value_of(scalar.value)
    if pa.types.is_map(kind):
        return {value_of(entry["key"]): value_of(entry["value"]) for entry in scalar.values}
    if pa.types.is_struct(kind):
        return {name: value_of(member) for name, member in scalar.items()}
    if isinstance(scalar, pa.ListScalar):
        return [value_of(member) for member in scalar.values]
    if pa.types.is_duration(kind):
        return Decimal(scalar.value).scaleb(-3 * UNITS.index(kind.unit))
    if pa.types.is_date(kind):
        return str(scalar.cast(pa.string()))
    if (pa.types.is_timestamp(kind) or pa.types.is_time64(kind)) and kind.unit == "ns":
        return nanoseconds(scalar)
    return scalar.as_py()


def nanoseconds(scalar: Any) -> str:
    """A time of day or a timestamp as ISO 8601, with nanoseconds where it has some."""
    kind = pa.time64("us") if pa.types.is_time64(scalar.type) else pa.timestamp("us", scalar.type.tz)
    micros, nanos = divmod(scalar.value, 1000)
    rounded = pa.scalar(micros, kind).as_py()
    if not nanos:
        return str(rounded.isoformat())
    text = rounded.isoformat(timespec="microseconds")
    end = text.index(".") + 7
    return f"{text[:end]}{nanos:03}{text[end:]}"


class Inexact(Exception):
    """A Decimal is no float: `digits` write it."""


def as_json(value: Any) -> str:
    try:
        text = json_line(value, json_form, allow_nan=False)
    except (Inexact, ValueError):
        return digits(value)
    return text if text.isascii() or encodable(text) else json.dumps(value, default=json_form)


def digits(value: Any) -> str:
    """JSON with every digit of its decimals, of which `json` makes floats, and null for what JSON has no number."""
    if isinstance(value, float) and not math.isfinite(value):
        return "null"
    if isinstance(value, Decimal):
        return format(value, "f")
    if isinstance(value, dict):
        names = [as_json(name if isinstance(name, str) else as_json(name)) for name in value]
        return "{" + ", ".join(f"{n}: {digits(v)}" for n, v in zip(names, value.values(), strict=True)) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(digits, value)) + "]"
    return as_json(value)


def encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def json_form(value: Any) -> Any:
    """JSON for the Arrow values that have none of their own: dates as ISO 8601, bytes as base64.

    Raises:
        Inexact: a Decimal has more digits than a float.
    """
    if isinstance(value, Decimal):
        if Decimal(repr(float(value))) != value:
            raise Inexact
        return float(value)
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return value.total_seconds() if isinstance(value, timedelta) else str(value)
