"""Text columns, and text that no tokenizer takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from complete_fn.errors import InputError


def as_text(column: Any, name: str) -> Any:
    """The column as large_string.

    Raises:
        InputError: its type has no text form (binary, nested).
    """
    kind = column.type
    if pa.types.is_dictionary(kind):
        column = pc.cast(column, kind.value_type)
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_nested(kind):
        raise InputError(f"Column {name!r} is {kind}; a prompt needs text. Cast or select a text column.")
    try:
        return pc.cast(column, pa.large_string())
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid) as error:
        raise InputError(f"Column {name!r} is {kind}, which has no text form: {error}") from error


def text_column(texts: Sequence[str | None]) -> pa.Array:
    """Python strings as large_string; lone surrogates are kept as bytes that are not UTF-8: their rows will fail.

    Raises:
        InputError: a value is neither a string nor None.
    """
    try:
        return pa.array(texts, pa.large_string())
    except UnicodeEncodeError:
        raw = [None if t is None else t.encode("utf-8", "surrogatepass") for t in texts]
        return pa.array(raw, pa.large_binary()).view(pa.large_string())
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise InputError(f"The prompts are not all text: {error}") from error


def to_texts(column: Any) -> list[str]:
    """The strings of an Arrow column; bytes that are not UTF-8 become lone surrogates, so that their row can fail."""
    try:
        texts: list[str] = column.to_pylist()
        return texts
    except UnicodeDecodeError:
        raw = column.cast(pa.large_binary()).to_pylist()
        found: list[Any] = [b if b is None else b.decode("utf-8", "surrogateescape") for b in raw]
        return found


def is_utf8(text: str | None) -> bool:
    try:
        (text or "").encode()
    except UnicodeEncodeError:
        return False
    return True


def without_surrogates(text: str) -> str:
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
