"""With the option `reorder_fields` a prompt's fields are packed apart and rendered as labelled lines, in any order.

The model sees the instruction, an empty line, and one line `name: value` for each field:

    Name the section.

    maintainer: Debian Perl Group
    package: libfoo-perl

The instruction is the template without the fields at its end and the white space between them; a field elsewhere in
the template is written as <name>. The planner chooses the order of each row's lines. The order is no part of the
answer's key, which holds the template, and the fields in the template's order. So equal rows are one prompt, and a
resumed job finds its answers although each attempt may choose another order for the rows that are left.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from complete_fn.errors import InvalidOptionError

FIELDS_MARK = "\x00fields:"  # no user's text begins like this: `templates.escape` doubles a leading NUL


@dataclass(frozen=True, slots=True)
class FieldPrompt:
    """One prompt, with the names and values of its fields in the template's order."""

    instruction: str
    names: tuple[str, ...]
    values: tuple[str, ...]

    def render(self, order: Sequence[int] | None = None) -> str:
        """The text that the model sees. `order` lists field numbers; None keeps the template's order."""
        chosen = range(len(self.names)) if order is None else order
        return head(self.instruction) + "".join(line(self.names[f], self.values[f]) for f in chosen).removesuffix("\n")


def head(instruction: str) -> str:
    return f"{instruction}\n\n" if instruction else ""


def line(name: str, value: str) -> str:
    return f"{name}: {value}\n"


def instruction_of(pieces: list[tuple[str, str | None]]) -> tuple[str, tuple[str, ...]]:
    """(instruction, names of the fields) of a parsed template.

    Raises:
        InvalidOptionError: The template names no field.
    """
    names = tuple(dict.fromkeys(name for _, name in pieces if name is not None))
    if not names:
        raise InvalidOptionError("reorder_fields needs a template that names fields: write {name} for each.")
    tail, kept = pieces[-1][0], list(pieces[:-1])
    while kept and not tail.strip():
        tail = kept.pop()[0]
    return ("".join(f"{text}<{name}>" for text, name in kept) + tail).strip(), names


def pack_fields(template: list[tuple[str, str | None]], columns: Mapping[str, Any], length: int) -> pa.ChunkedArray:
    """One planned prompt per row, large_string; a row with a NULL field is NULL.

    Args:
        template: the pieces that `templates.parse_template` returns.
        columns: large_string arrays of `length` values by field name, one for each field of the template.
    """
    instruction, names = instruction_of(template)
    kind = pa.large_string()
    values = [columns[n] for n in names]
    sizes = [pc.utf8_length(v).cast(kind) for v in values]
    lengths = pc.binary_join_element_wise(*sizes, pa.scalar(",", kind))
    whole = pc.binary_join_element_wise(
        pa.scalar(packed_head(instruction, names), kind), lengths, pa.scalar("\x00", kind), *values, pa.scalar("", kind)
    )
    return whole if isinstance(whole, pa.ChunkedArray) else pa.chunked_array([whole])


def packed_head(instruction: str, names: tuple[str, ...]) -> str:
    return FIELDS_MARK + json.dumps([instruction, names], ensure_ascii=True) + "\x00"


def has_fields(text: str) -> bool:
    return text.startswith(FIELDS_MARK)


def unpack_fields(text: str) -> FieldPrompt:
    """The prompt that `pack_fields` packed into this text."""
    packed, lengths, values = text.removeprefix(FIELDS_MARK).split("\x00", 2)
    instruction, names = header(packed)
    at, found = 0, []
    for size in map(int, lengths.split(",")):
        found.append(values[at : at + size])
        at += size
    return FieldPrompt(instruction, names, tuple(found))


@lru_cache(maxsize=64)
def header(packed: str) -> tuple[str, tuple[str, ...]]:
    instruction, names = json.loads(packed)
    return instruction, tuple(names)
