"""A template becomes a prompt: a field replaces `{name}`, a brace replaces `{{` and `}}`; there is nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from complete_fn.errors import InputError, InvalidOptionError, did_you_mean
from complete_fn.prompts.fields import FIELDS_MARK, pack_fields, unpack_fields
from complete_fn.text import as_text, text_column
from complete_fn.types import Message

TOKEN = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
MOST_FIELDS = 1_000  # {name} in a template: each costs time for every row, even where the column is empty
NAME = re.compile(r"[^\W\d][\w ]*", re.UNICODE)


def parse_template(template: str) -> list[tuple[str, str | None]]:
    """Pairs of (text, name of the field behind the text); the last pair has no field but None.

    Raises:
        InvalidOptionError: The template has a lone brace, braces around more than a name, or too many names.
    """
    pieces: list[tuple[str, str | None]] = []
    text, end = "", 0
    for match in TOKEN.finditer(template):
        text += template[end : match.start()]
        end = match.end()
        found = match.group(0)
        if found in ("{{", "}}"):
            text += found[0]
        elif match.group(1) is not None and NAME.fullmatch(match.group(1)):
            pieces.append((text, match.group(1)))
            text = ""
            if len(pieces) > MOST_FIELDS:
                raise InvalidOptionError(
                    f"The template has more than {MOST_FIELDS:,} fields. Join columns before, and name the result."
                )
        else:
            raise InvalidOptionError(
                f"The template has {found!r} at character {match.start()}: only {{name}} is replaced. "
                "Write {{ and }} for braces."
            )
    return [*pieces, (text + template[end:], None)]


def template_fields(template: str) -> list[str]:
    return [name for _, name in parse_template(template) if name is not None]


def refuse_missing(fields: Collection[str], names: Collection[str]) -> None:
    """Raises:
    InputError: A field of the template is none of the columns `names`.
    """
    for field in fields:
        if field not in names:
            hint = did_you_mean(field, names, "{{{}}}")
            there = ", ".join(names) or "none"
            raise InputError(f"The prompt names {{{field}}}, which is no column.{hint} Columns: {there}.")


def render_column(
    template: str, columns: Mapping[str, Any], length: int, reorder_fields: bool = False
) -> pa.ChunkedArray:
    """One planned prompt (see `escaped`) per row, large_string; a row with a NULL field is NULL.

    Args:
        columns: arrays of `length` values by field name; values that are no strings are cast as SQL casts them.
        reorder_fields: keep the fields apart, so that the planner may order them row by row (see `fields`).

    Raises:
        InvalidOptionError: The template cannot be used.
        InputError: The template names a field that is no column.
    """
    fields = template_fields(template)
    refuse_missing(fields, columns)
    texts = {n: as_text(columns[n], n) for n in dict.fromkeys(fields)}
    if reorder_fields:
        return pack_fields(parse_template(template), texts, length)
    parts: list[Any] = []
    for text, name in parse_template(template):
        if text:
            parts.append(pa.scalar(text, pa.large_string()))
        if name is not None:
            parts.append(texts[name])
    if not any(isinstance(p, pa.ChunkedArray | pa.Array) for p in parts):
        whole = "".join(p.as_py() for p in parts)
        return pa.chunked_array([pa.repeat(pa.scalar(escape(whole), pa.large_string()), length)])
    joined = escaped(pc.binary_join_element_wise(*parts, pa.scalar("", pa.large_string())))
    return joined if isinstance(joined, pa.ChunkedArray) else pa.chunked_array([joined])


def plain_column(prompts: Any) -> Any:
    """Texts of any Arrow string type, or of a Python sequence, as large_string.

    Raises:
        InputError: The values are no text.
    """
    if not isinstance(prompts, pa.Array | pa.ChunkedArray):
        return text_column(prompts)
    kind = prompts.type
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        whole = prompts.combine_chunks() if isinstance(prompts, pa.ChunkedArray) else prompts
        return whole.cast(pa.large_binary()).view(pa.large_string())
    return as_text(prompts, "prompt")


MESSAGES_MARK = "\x00messages:"  # no user's text begins like this once it is escaped


def escape(text: str) -> str:
    """A user's text as a planned prompt. A leading NUL is doubled, so that no data can pose as packed messages."""
    return "\x00" + text if text.startswith("\x00") else text


def escaped(column: Any) -> Any:
    """`escape` for a column of texts."""
    marked = pc.starts_with(column, "\x00")
    if not pc.any(marked).as_py():
        return column
    nul = pa.scalar("\x00", pa.large_string())
    return pc.if_else(marked, pc.binary_join_element_wise(nul, column, pa.scalar("", pa.large_string())), column)


def pack_messages(messages: list[Mapping[str, str]]) -> str:
    """Messages as one canonical text, so that a conversation is planned, merged and stored like a string.

    A single message of a user becomes the bare prompt: an engine renders both alike, so both share one answer.
    """
    if len(messages) == 1 and messages[0].get("role") == "user":
        return escape(str(messages[0].get("content", "")))
    pairs = [[str(m.get("role", "")), str(m.get("content", ""))] for m in messages]
    return MESSAGES_MARK + json.dumps(pairs, ensure_ascii=False, separators=(",", ":"))


def unpack(text: str) -> str | tuple[Message, ...]:
    """The prompt behind a planned text: a text, or the messages packed in it."""
    if not text.startswith("\x00"):
        return text
    if text.startswith(FIELDS_MARK):
        return unpack_fields(text).render()
    if not text.startswith(MESSAGES_MARK):
        return text[1:]
    return tuple(Message(role, content) for role, content in json.loads(text[len(MESSAGES_MARK) :]))
