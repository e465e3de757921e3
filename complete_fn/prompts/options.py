"""Options of a call, checked before the first paid row. The table `OPTIONS` has what each one does and takes."""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
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
SAMPLING = tuple(f.name for f in fields(SamplingParams))


@dataclass(frozen=True, slots=True)
class Options:
    """The options of one call, the same for all its rows."""

    sampling: SamplingParams = SamplingParams()
    response_format: str | None = None
    choices: tuple[str, ...] = ()
    cache: CacheMode = "on"
    strict: bool = False
    reorder_fields: bool = False


Check = Callable[[str, Any], Any]


@dataclass(frozen=True, slots=True)
class CallOption:
    """One option of a call: a field of `Options` or of `SamplingParams`.

    Attributes:
        what: What the option does, for the reference page.
        check: Takes the option's name and a given value, and returns the value that the call has.
    """

    what: str
    check: Check


def parse_options(given: Mapping[str, Any] | Options | None) -> Options:
    """Options from a mapping. An entry of None counts as not given. Options that are parsed already are returned.

    Raises:
        InvalidOptionError: An option's name is unknown or its value out of range; the message has both.
    """
    if isinstance(given, Options):
        return given
    found = {k: v for k, v in (given or {}).items() if v is not None}
    if unknown := sorted(set(found) - set(OPTIONS)):
        hint = did_you_mean(unknown[0], OPTIONS)
        raise InvalidOptionError(f"Unknown option {unknown[0]!r}.{hint} Options: {', '.join(OPTIONS)}.")
    checked = {name: option.check(name, found[name]) for name, option in OPTIONS.items() if name in found}
    if "choices" in checked:
        refuse_beside_choices(found)
    sampling = {name: checked.pop(name) for name in SAMPLING if name in checked}
    return Options(sampling=SamplingParams(**sampling), **checked)


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


def flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise InvalidOptionError(f"{name} = {value!r} is not true or false.")
    return value


def number_within(low: float, high: float, open_below: bool = False) -> Check:
    """A check that takes the numbers from `low` to `high`; with `open_below` not `low` itself."""

    def check(name: str, given: Any) -> float:
        try:
            value = math.nan if isinstance(given, bool) else float(given)
        except (TypeError, ValueError):
            value = math.nan
        if not low <= value <= high or (open_below and value == low):
            above = "above" if open_below else "at least"
            raise InvalidOptionError(f"{name} = {given!r} must be a number {above} {low:g} and at most {high:g}.")
        return value

    return check


def whole_from(low: int) -> Check:
    """A check that takes the whole numbers from `low` that a database keeps in 64 bits."""

    def check(name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < low or value >= 1 << 63:
            raise InvalidOptionError(f"{name} = {value!r} must be a whole number, at least {low}.")
        return value

    return check


def stops(name: str, value: Any) -> tuple[str, ...]:
    texts = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list | tuple) else (None,)
    if len(texts) > 16 or not all(isinstance(t, str) and t for t in texts):
        raise InvalidOptionError(f"{name} = {value!r} must be a text or at most 16 texts, none empty.")
    return texts


def cache_mode(name: str, value: Any) -> CacheMode:
    if value not in get_args(CacheMode):
        raise InvalidOptionError(f"{name} = {value!r} is not one of 'on', 'off', 'refresh'.")
    return cast(CacheMode, value)


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


# Every option of a call. Its default stands in the dataclass that has its field.
OPTIONS = {
    "temperature": CallOption(
        "How much chance there is in the answer. At 0 the likeliest token is taken each time; only such answers are "
        "merged and reused.",
        number_within(0.0, 2.0),
    ),
    "top_p": CallOption(
        "Draw only from the likeliest tokens that have this share of the probability together.",
        number_within(0.0, 1.0, open_below=True),
    ),
    "top_k": CallOption("Draw only from this many of the likeliest tokens; 0 draws from all.", whole_from(0)),
    "max_tokens": CallOption(
        "Tokens of an answer at most. Without it, the model's `default_max_tokens` ends the answer, and a row cut "
        "there has the error `truncated`.",
        whole_from(1),
    ),
    "seed": CallOption("Makes draws above temperature 0 repeatable on the same engine.", whole_from(0)),
    "stop": CallOption("Texts before which the answer ends.", stops),
    "response_format": CallOption(
        "A JSON schema that every answer satisfies. Takes the bare schema, OpenAI's `json_schema` form or Snowflake's "
        "`json` form.",
        lambda _, value: canonical_schema(value),
    ),
    "choices": CallOption(
        "2 to 128 labels. The answer is the label that the model finds likeliest; it takes one output token where the "
        "labels' first tokens differ. `complete_details` has each label's probability.",
        lambda _, value: parse_choices(value),
    ),
    "cache": CallOption(
        "`on` uses and keeps answers, `off` does neither, `refresh` asks again and keeps the new answer.", cache_mode
    ),
    "strict": CallOption("One failed row fails the query.", flag),
    "reorder_fields": CallOption(
        "Writes the fields of `prompt(template, {...})` as lines `name: value` behind the instruction, in the order in "
        "which each row shares most with others, so that the prefix cache holds more. `complete_details` tells the "
        "order in `field_order`.",
        flag,
    ),
}
