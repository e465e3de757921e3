"""Options of a call, checked before the first paid row: sampling, response_format, choices, cache and strict."""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import jsonschema
import referencing.exceptions

from complete_fn.errors import InvalidOptionError, did_you_mean
from complete_fn.prompts.choices import parse_choices
from complete_fn.prompts.schema_rules import VALUES, refuse_heavy, resolver_of
from complete_fn.text import is_utf8
from complete_fn.types import SamplingParams

CacheMode = Literal["on", "off", "refresh"]
SCHEMA_BYTES, SCHEMA_DEPTH = 65_536, 16


@dataclass(frozen=True, slots=True)
class Options:
    """The options of one call, the same for all its rows."""

    sampling: SamplingParams = SamplingParams()
    response_format: str | None = None
    choices: tuple[str, ...] = ()
    cache: CacheMode = "on"
    strict: bool = False
    reorder_fields: bool = False


OPTION_NAMES = (
    "temperature",
    "top_p",
    "top_k",
    "max_tokens",
    "seed",
    "stop",
    "response_format",
    "choices",
    "cache",
    "strict",
    "reorder_fields",
)


def parse_options(given: Mapping[str, Any] | Options | None) -> Options:
    """Options from a mapping. An entry of None counts as not given. Options that are parsed already are returned.

    Raises:
        InvalidOptionError: An option's name is unknown or its value out of range; the message has both.
    """
    if isinstance(given, Options):
        return given
    found = {k: v for k, v in (given or {}).items() if v is not None}
    if unknown := sorted(set(found) - set(OPTION_NAMES)):
        hint = did_you_mean(unknown[0], OPTION_NAMES)
        raise InvalidOptionError(f"Unknown option {unknown[0]!r}.{hint} Options: {', '.join(OPTION_NAMES)}.")
    cache = found.get("cache", "on")
    if cache not in get_args(CacheMode):
        raise InvalidOptionError(f"cache = {cache!r} is not one of 'on', 'off', 'refresh'.")
    schema = found.get("response_format")
    choices = parse_choices(found["choices"]) if "choices" in found else ()
    if choices:
        refuse_beside_choices(found)
    return Options(
        sampling=SamplingParams(
            temperature=number(found, "temperature", 0.0, 0.0, 2.0),
            top_p=number(found, "top_p", 1.0, 0.0, 1.0, open_below=True),
            top_k=whole(found, "top_k", 0, 0) or 0,
            max_tokens=whole(found, "max_tokens", None, 1),
            seed=whole(found, "seed", None, 0),
            stop=stops(found.get("stop", ())),
        ),
        response_format=None if schema is None else canonical_schema(schema),
        choices=choices,
        cache=cast(CacheMode, cache),
        strict=flag(found, "strict"),
        reorder_fields=flag(found, "reorder_fields"),
    )


def refuse_beside_choices(found: Mapping[str, Any]) -> None:
    """With `choices` the likeliest label is the answer. Nothing is drawn, written or cut: other options do nothing."""
    meaningless = [n for n in ("top_p", "top_k", "max_tokens", "seed", "stop", "response_format") if n in found]
    if found.get("temperature"):
        meaningless.insert(0, "temperature")
    if meaningless:
        raise InvalidOptionError(
            f"{meaningless[0]} = {found[meaningless[0]]!r} means nothing beside choices, whose likeliest label is the "
            "answer. Leave it out."
        )


def flag(found: Mapping[str, Any], name: str) -> bool:
    value = found.get(name, False)
    if not isinstance(value, bool):
        raise InvalidOptionError(f"{name} = {value!r} is not true or false.")
    return value


def number(
    found: Mapping[str, Any], name: str, default: float, low: float, high: float, open_below: bool = False
) -> float:
    value = found.get(name, default)
    try:
        value = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        value = math.nan
    if not low <= value <= high or (open_below and value == low):
        above = "above" if open_below else "at least"
        raise InvalidOptionError(f"{name} = {found[name]!r} must be a number {above} {low:g} and at most {high:g}.")
    return value


def whole(found: Mapping[str, Any], name: str, default: int | None, low: int) -> int | None:
    if name not in found:
        return default
    value = found[name]
    if isinstance(value, bool) or not isinstance(value, int) or value < low or value >= 1 << 63:
        raise InvalidOptionError(f"{name} = {value!r} must be a whole number, at least {low}.")
    return value


def stops(value: Any) -> tuple[str, ...]:
    texts = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list | tuple) else (None,)
    if len(texts) > 16 or not all(isinstance(t, str) and t for t in texts):
        raise InvalidOptionError(f"stop = {value!r} must be a text or at most 16 texts, none empty.")
    return texts


def canonical_schema(given: Any) -> str:
    """A JSON schema as canonical text, from a bare schema, OpenAI's `json_schema` form or Snowflake's `json` form.

    Raises:
        InvalidOptionError: The value is no JSON schema, has more than 64 KiB or more than 16 levels.
    """
    schema = given
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise InvalidOptionError(f"response_format is not JSON: {error}") from error
    if isinstance(schema, Mapping) and schema.get("type") == "json_schema":
        wrapped = schema.get("json_schema")
        schema = wrapped.get("schema") if isinstance(wrapped, Mapping) else None
    elif isinstance(schema, Mapping) and schema.get("type") == "json":
        schema = schema.get("schema")
    if deeper(schema, SCHEMA_DEPTH):
        raise InvalidOptionError(f"response_format is nested deeper than {SCHEMA_DEPTH} levels.")
    schema = without_nulls(schema)
    if not isinstance(schema, Mapping) or not schema:
        raise InvalidOptionError(f"response_format = {reprlib.repr(given)} is not a JSON schema (an object).")
    try:
        jsonschema.Draft202012Validator.check_schema(schema)
    except jsonschema.SchemaError as error:
        where = "/".join(str(p) for p in error.absolute_path) or "the top"
        raise InvalidOptionError(f"response_format is not a valid JSON schema at {where}: {error.message}") from error
    check_references(schema)
    refuse_heavy(schema)
    text = json.dumps(schema, ensure_ascii=False, separators=(",", ":"))
    if not is_utf8(text):
        raise InvalidOptionError("response_format has half of a character (a lone surrogate).")
    size = len(text.encode())
    if size > SCHEMA_BYTES:
        raise InvalidOptionError(f"response_format has {size} bytes; at most {SCHEMA_BYTES} are taken.")
    return text


def check_references(schema: Any) -> None:
    """Refuse a `$ref` that leaves the schema, names nothing in it, or leads only to itself.

    An `$id` below the top would give `#/..` another meaning there, so it is refused too.
    """
    if has_inner_id(schema):
        raise InvalidOptionError(
            "response_format has an $id below its top. Leave it out: $ref '#/..' starts at the top."
        )
    resolver = resolver_of(schema)
    for given in references(schema):
        reference, seen = given, set[str]()
        while reference not in seen:
            seen.add(reference)
            try:
                found = resolver.lookup(reference).contents if reference.startswith("#") else None
            except referencing.exceptions.Unresolvable:
                found = None
            if found is None:
                raise InvalidOptionError(f"response_format has $ref {reference!r}, which is not within the schema.")
            following = found.get("$ref") if isinstance(found, Mapping) else None
            if not isinstance(following, str):
                break
            reference = following
        else:
            raise InvalidOptionError(f"response_format has $ref {given!r}, which leads only to itself.")


def has_inner_id(value: Any, is_top: bool = True) -> bool:
    if isinstance(value, Mapping):
        if not is_top and isinstance(value.get("$id"), str):
            return True
        return any(has_inner_id(inner, False) for name, inner in value.items() if name not in VALUES)
    return isinstance(value, list) and any(has_inner_id(inner, False) for inner in value)


def references(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            if name in ("$ref", "$dynamicRef") and isinstance(inner, str):
                yield inner
            else:
                yield from references(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from references(inner)


def without_nulls(value: Any) -> Any:
    """The value without members that are NULL. SQL gives all structs of a list the same fields and fills in NULL."""
    if isinstance(value, Mapping):
        return {k: without_nulls(v) for k, v in value.items() if v is not None}
    return [without_nulls(v) for v in value] if isinstance(value, list) else value


def deeper(value: Any, levels: int) -> bool:
    """Whether the value has more levels, without members that are NULL. No recursion: callers may nest at any depth."""
    level = [value]
    for _ in range(levels):
        level = [child for v in level for child in children(v)]
    return bool(level)


def children(value: Any) -> Iterable[Any]:
    if isinstance(value, Mapping):
        return (v for v in value.values() if v is not None)
    return value if isinstance(value, list) else ()
