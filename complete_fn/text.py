"""Text columns, and text that is not UTF-8: lone surrogates in a string, or bytes that no string has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


def encode_text(text: str) -> bytes:
    """The UTF-8 of any text. A lone surrogate gets three bytes that UTF-8 forbids: different texts stay different."""
    return text.encode("utf-8", "surrogatepass")


def decode_bytes(raw: bytes) -> str:
    """The text of any bytes. A byte that is not UTF-8 becomes a lone surrogate."""
    return raw.decode("utf-8", "surrogateescape")


def restore_bytes(text: str) -> bytes:
    """The bytes that `decode_bytes` has read.

    Raises:
        UnicodeEncodeError: The text has a lone surrogate that stands for no byte.
    """
    return text.encode("utf-8", "surrogateescape")


def is_utf8(text: str | None) -> bool:
    if text is None or text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def without_surrogates(text: str) -> str:
    """The text with U+FFFD for each lone surrogate, so that a tokenizer, a database or an engine takes it."""
    return text if is_utf8(text) else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def escape_surrogates(text: str) -> str:
    """The text with the escape `\\udc80` for the lone surrogate of that number."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


def text_column(texts: Sequence[str | None], encode: Callable[[str], bytes] = encode_text) -> pa.Array:
    """Python strings as large_string; lone surrogates are kept as bytes that are not UTF-8: their rows will fail.

    Args:
        encode: `restore_bytes` for texts that `to_texts` has read: each byte comes back.

    Raises:
        InputError: a value is neither a string nor None.
    """
    try:
        return pa.array(texts, pa.large_string())
    except UnicodeEncodeError:
        raw = [None if t is None else encode(t) for t in texts]
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
        found: list[Any] = [b if b is None else decode_bytes(b) for b in raw]
        return found


def is_utf8_column(column: Any) -> bool:
    """Whether all text of a column is UTF-8, which other readers of a file require. Copies nothing."""
    raw = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}.get(column.type)
    try:
        return raw is None or column.cast(raw).cast(column.type) is not None
    except pa.ArrowInvalid:
        return False
