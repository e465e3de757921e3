"""Values become JSON that stays on one line for every reader."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Any

import pyarrow as pa

from complete_fn.text import is_utf8, to_texts

# JSON allows these characters in strings, but str.splitlines and many readers of JSONL or events end a line there.
LINE_ENDS = {ord(c): f"\\u{ord(c):04x}" for c in "\x85\u2028\u2029"}


def json_line(value: Any, default: Callable[[Any], Any] | None = None, allow_nan: bool = True) -> str:
    """`value` as JSON. Characters that end a line are escaped; all other characters stay as they are.

    Raises:
        ValueError: The value has a NaN or an infinity and `allow_nan` is False.
    """
    return json.dumps(value, ensure_ascii=False, default=default, allow_nan=allow_nan).translate(LINE_ENDS)


UNITS = ("s", "ms", "us", "ns")


def json_values(column: Any) -> list[str]:
    """Each value as JSON. Text that is not UTF-8 keeps its bytes as escaped lone surrogates."""
    text = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
    return [as_json(v) for v in (to_texts(column) if text else values_of(column))]


def values_of(column: Any) -> list[Any]:
    """Python values. If Python has no type for one of the times, they become ISO 8601 and durations become seconds."""
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
    """A time of day or a timestamp as ISO 8601, with nanoseconds if they are not zero."""
    kind = pa.time64("us") if pa.types.is_time64(scalar.type) else pa.timestamp("us", scalar.type.tz)
    micros, nanos = divmod(scalar.value, 1000)
    rounded = pa.scalar(micros, kind).as_py()
    if not nanos:
        return str(rounded.isoformat())
    text = rounded.isoformat(timespec="microseconds")
    end = text.index(".") + 7
    return f"{text[:end]}{nanos:03}{text[end:]}"


class Inexact(Exception):
    """A Decimal has no equal float, so `digits` must write the value."""


def as_json(value: Any) -> str:
    try:
        text = json_line(value, json_form, allow_nan=False)
    except (Inexact, ValueError):
        return digits(value)
    return text if is_utf8(text) else json.dumps(value, default=json_form)


def digits(value: Any) -> str:
    """JSON with every digit of decimals, which `json` would round to floats, and null for NaN and the infinities."""
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


def json_form(value: Any) -> Any:
    """A JSON form of a value that JSON has no type for: dates become ISO 8601, bytes base64.

    Raises:
        Inexact: A Decimal has more digits than a float.
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
