"""Arrow columns become prompts, and answers become columns. Only this module handles NULL, prompt types and options."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from complete_fn.errors import InputError, InvalidOptionError
from complete_fn.prompts.templates import escaped, pack_messages, render_column, template_fields
from complete_fn.text import as_text

PROMPT = pa.struct([("template", pa.string()), ("fields", pa.map_(pa.string(), pa.string()))])
POSITION = re.compile(r"(?<!\{)\{(\d+)\}(?!\})")

NUMBERED = re.compile(r"\{_(\d+)\}")


@dataclass(frozen=True)
class CallGroup:
    """Rows with the same model and options, which are planned together. If `rows` is None, these are all rows."""

    model: str
    options: Mapping[str, Any] | None
    rows: Any = None


def one_array(column: Any) -> Any:
    """The column as one Array. Extension and dictionary types become the type that they store."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(array, pa.ChunkedArray):  # more than 2 GiB of text stays in chunks
        array = pa.concat_arrays([c.cast(pa.large_string()) for c in array.chunks])
    if isinstance(array.type, pa.BaseExtensionType):
        array = array.storage
    return array.cast(array.type.value_type) if pa.types.is_dictionary(array.type) else array


def is_text(kind: Any) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def prompt_column(column: Any, reorder_fields: bool = False) -> Any:
    """[n] large_string: the planned prompt (see `prompts.escaped`) of each row; NULL for a row without a prompt.

    Args:
        column: text, `prompt(template, {fields})` structs, or messages as LIST(STRUCT(role, content)).
        reorder_fields: keep the fields of structs separate, for the planner to order (see `field_prompts`).

    Raises:
        InputError: The column has another type; the message has the type and the cast to write.
        InvalidOptionError: A template cannot be used.
    """
    array = one_array(column)
    kind = array.type
    if is_text(kind):
        return escaped(array.cast(pa.large_string()))
    if pa.types.is_null(kind):
        return pa.nulls(len(array), pa.large_string())
    if pa.types.is_struct(kind) and {"template", "fields"} <= set(kind.names):
        return render_structs(array, reorder_fields)
    if is_list(kind) and pa.types.is_struct(kind.value_type) and {"role", "content"} <= set(kind.value_type.names):
        return pa.array([pack_conversation(row) for row in array.to_pylist()], pa.large_string())
    raise InputError(
        f"The prompt is {kind}; it must be text, prompt(template, {{fields}}) or messages with role and content. "
        "Cast it: complete(model, CAST(x AS VARCHAR)) in SQL, pl.col('x').cast(pl.String) in Polars."
    )


def is_list(kind: Any) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def pack_conversation(messages: list[Mapping[str, str] | None] | None) -> str | None:
    """The messages packed as one text; NULL if the list, a message, a role or a content is NULL."""
    if messages is None or any(m is None or m["role"] is None or m["content"] is None for m in messages):
        return None
    return pack_messages([m for m in messages if m is not None])


def render_structs(structs: Any, reorder_fields: bool) -> Any:
    """[n] large_string from [n] structs of template and fields (a STRUCT or a MAP), template by template."""
    parts = dict(zip(structs.type.names, structs.flatten(), strict=True))
    templates = as_text(parts["template"], "template")
    out = pa.nulls(len(structs), pa.large_string())
    for template in pc.unique(templates).drop_null().to_pylist():
        columns = field_columns(template, parts["fields"])
        texts = render_column(template, columns, len(structs), reorder_fields)
        out = pc.if_else(pc.fill_null(pc.equal(templates, template), False), one_array(texts), out)
    return out


def field_columns(template: str, fields: Any) -> dict[str, Any]:
    """The fields by name, as arrays of n values each."""
    kind = fields.type
    if pa.types.is_struct(kind):
        return dict(zip(kind.names, fields.flatten(), strict=True))
    if pa.types.is_map(kind):
        known = pc.unique(fields.keys).to_pylist()
        return {name: pc.map_lookup(fields, name, "first") for name in known if name in template_fields(template)}
    if pa.types.is_null(kind):
        return {}
    raise InputError(f"The fields of a prompt are {kind}; write them as {{'name': column}} (a STRUCT or a MAP).")


def prompt_structs(columns: list[Any]) -> Any:
    """[n] PROMPT from (template, {fields}) or, as Snowflake writes it, (template with {0} {1}, value, value).

    Raises:
        InvalidOptionError: A template cannot be used.
        InputError: A field has no text form, or a template names a field that is not given.
    """
    template, *rest = [one_array(c) for c in columns]
    if not (is_text(template.type) or pa.types.is_null(template.type)):
        raise InputError(f"The template of prompt() is {template.type}; it must be text.")
    template = template.cast(pa.large_string())
    if len(rest) == 1 and (pa.types.is_struct(rest[0].type) or pa.types.is_map(rest[0].type)):
        names, values = named_fields(rest[0])
    else:
        names, values = [f"_{n}" for n in range(len(rest))], rest
        template = name_positions(template)
    texts = [as_text(one_array(v), n).cast(pa.string()) for n, v in zip(names, values, strict=True)]
    for text in pc.unique(template).drop_null().to_pylist():
        if missing := sorted(set(template_fields(text)) - set(names)):
            shown, field = (NUMBERED.sub(r"{\1}", t) for t in (text, f"{{{missing[0]}}}"))
            raise InputError(f"The template {shown!r} names {field}, which is not among the fields given.")
    return with_fields(template.cast(pa.string()), names, texts)


def named_fields(fields: Any) -> tuple[list[str], list[Any]]:
    """Names and columns of a STRUCT, or of a MAP by its distinct keys."""
    if pa.types.is_struct(fields.type):
        return list(fields.type.names), fields.flatten()
    names = [str(n) for n in pc.unique(fields.keys).to_pylist()]
    return names, [pc.map_lookup(fields, name, "first") for name in names]


def name_positions(template: Any) -> Any:
    """The template with `{_0}` for `{0}`. A field needs a name, and a number is none."""
    changed = {t: POSITION.sub(r"{_\1}", t) for t in pc.unique(template).drop_null().to_pylist()}
    return pa.array([changed.get(t) for t in template.to_pylist()], pa.large_string())


def with_fields(template: Any, names: list[str], texts: list[Any]) -> Any:
    """[n] PROMPT: every row's map has all names, in order."""
    n, k = len(template), len(names)
    keys = pa.array(names * n, pa.string())
    joined = pa.concat_arrays(texts) if texts else pa.array([], pa.string())
    row_by_row = np.arange(n * k).reshape(k, n).T.ravel()
    offsets = pa.array(np.arange(n + 1) * k, pa.int32())
    fields = pa.MapArray.from_arrays(offsets, keys, joined.take(pa.array(row_by_row)))
    return pa.StructArray.from_arrays([template, fields], fields=list(PROMPT), mask=pc.is_null(template))


def is_constant(column: Any) -> bool:
    return len(column) < 2 or bool(column.slice(1).equals(column.slice(0, len(column) - 1)))


def groups(model: Any, options: Any | None) -> Iterator[CallGroup]:
    """The rows in groups of equal model and options, without the rows whose model is NULL.

    Args:
        model: a column of names, or one name for all rows; then `options` is one mapping or None.

    Raises:
        InputError: The model is not text.
        InvalidOptionError: The options are not an object.
    """
    if isinstance(model, str):
        yield CallGroup(model, options)
        return
    models = one_array(model)
    if not (is_text(models.type) or pa.types.is_null(models.type)):
        raise InputError(f"The model is {models.type}; it must be a name (text).")
    chosen = None if options is None else one_array(options)
    if len(models) == 0 or models.null_count == len(models):
        return
    if is_constant(models) and (chosen is None or is_constant(chosen)):
        yield CallGroup(
            models[0].as_py(), None if chosen is None else option_mapping(python_values(chosen.slice(0, 1))[0])
        )
        return
    values = [None] * len(models) if chosen is None else python_values(chosen)
    found: dict[tuple[str, str], list[int]] = {}
    for row, (name, value) in enumerate(zip(models.to_pylist(), values, strict=True)):
        if name is not None:
            found.setdefault((name, json.dumps(option_mapping(value), sort_keys=True, default=str)), []).append(row)
    for (name, _), rows in found.items():
        yield CallGroup(name, option_mapping(values[rows[0]]), np.array(rows))


def python_values(column: Any) -> list[Any]:
    return [plain_value(v) for v in column.to_pylist(maps_as_pydicts="strict")]


def plain_value(value: Any) -> Any:
    """A DECIMAL as int or float, because SQL makes DECIMALs of literals such as 0.5; other values unchanged."""
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, dict):
        return {k: plain_value(v) for k, v in value.items()}
    return [plain_value(v) for v in value] if isinstance(value, list) else value


def option_mapping(value: Any) -> Mapping[str, Any] | None:
    """Options from a STRUCT, a MAP or JSON text.

    Raises:
        InvalidOptionError: The value is none of these.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise InvalidOptionError(f"The options {value!r} are not JSON: {error}") from error
    if value is None or isinstance(value, Mapping):
        return value
    raise InvalidOptionError(f"The options are {value!r}; write them as {{'temperature': 0.5}} or as JSON text.")


def by_group(length: int, chosen: list[CallGroup], answer: Callable[[CallGroup], Any], kind: Any) -> Any:
    """[length] values of `kind`: the answers of each group at its rows, NULL at rows that are in no group."""
    if len(chosen) == 1 and chosen[0].rows is None:
        return one_array(answer(chosen[0]))
    if not chosen:
        return pa.nulls(length, kind)
    where = np.full(length, -1, np.int64)
    at, parts = 0, []
    for group in chosen:
        where[group.rows] = np.arange(at, at + len(group.rows))
        at += len(group.rows)
        parts.append(one_array(answer(group)))
    return pa.concat_arrays(parts).take(pa.array(where, mask=where < 0))
