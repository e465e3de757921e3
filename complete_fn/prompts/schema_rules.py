"""Two kinds of schema are refused in a response_format: those whose check costs too much, and strangers' patterns."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

import referencing
import referencing.jsonschema

from complete_fn.errors import InvalidOptionError

PATTERNS = ("pattern", "patternProperties")
VALUES = ("enum", "const", "required")  # answers are compared with these values; any other keyword costs one step
NOTES = ("default", "examples")
ONE = (
    *("if", "then", "else", "not", "items", "contains", "additionalProperties", "propertyNames"),
    *("unevaluatedItems", "unevaluatedProperties"),
)
LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
NAMED = ("properties", "patternProperties", "dependentSchemas")  # keys in these are names, not keywords
DEFINITIONS = ("$defs", "definitions")
REFERENCES = ("$ref", "$dynamicRef")
# Beside these keywords jsonschema checks the other keywords once, and up to twice more to learn what they evaluated.
LOOK_AGAIN, TIMES = ("unevaluatedItems", "unevaluatedProperties"), 3
MOST_STEPS = 10_000  # subschemas that a check may visit; a schema of 64 KiB without references has some 3,000


def resolver_of(schema: Any) -> Any:
    """A resolver of references within the schema: `resolver_of(schema).lookup("#/$defs/a").contents`."""
    resource = referencing.jsonschema.DRAFT202012.create_resource(schema)
    return referencing.Registry().with_resource("", resource).resolver()


class SchemaSteps:
    """Counts the subschemas that a check of one value visits, with every reference written out in full.

    Each subschema is counted once, and its count is used for every reference to it. So counting takes linear time,
    although the count doubles with each level of `allOf: [ref, ref]`. A reference back into a subschema that is being
    counted (a tree's node in a tree) counts 1 and sets `is_recursive`, because its cost depends on the answer.
    """

    def __init__(self, schema: Any) -> None:
        self.lookup = resolver_of(schema).lookup
        self.counts: dict[int, int] = {}  # by the identity of a subschema; 0 while it is being counted
        self.is_recursive = self.has_unique = self.has_pattern = False
        self.total = self.count(schema)

    def count(self, schema: Any) -> int:
        if not isinstance(schema, Mapping):
            return 1
        known = self.counts.get(id(schema))
        if known is None:
            self.counts[id(schema)] = 0
            # The bound keeps numbers short: with thousands of digits the sum itself would be slow.
            known = self.counts[id(schema)] = min(self.count_within(schema), MOST_STEPS + 1)
        elif known == 0:
            self.is_recursive = True
        return known or 1

    def count_within(self, schema: Mapping[str, Any]) -> int:
        self.has_unique = self.has_unique or schema.get("uniqueItems") is True
        self.has_pattern = self.has_pattern or any(name in schema for name in PATTERNS)
        inner = sum(self.count(subschema) for subschema in subschemas(schema, self.lookup))
        values = sum(size_of(schema[name]) for name in VALUES if name in schema)
        return 1 + values + inner * (TIMES if any(name in schema for name in LOOK_AGAIN) else 1)


def subschemas(schema: Mapping[str, Any], lookup: Any) -> Iterator[Any]:
    """The schemas that a check of this schema visits next, including those that its references name."""
    for keyword, value in schema.items():
        if keyword in ONE:
            yield value
        elif keyword in LISTS and isinstance(value, list):
            yield from value
        elif keyword in NAMED and isinstance(value, Mapping):
            yield from value.values()
        elif keyword in REFERENCES and isinstance(value, str):
            yield lookup(value).contents


def size_of(value: Any) -> int:
    """The number of values within a JSON value, including the value itself."""
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return 1 + sum(map(size_of, inner))


def refuse_heavy(schema: Any) -> None:
    """Refuse a schema whose check visits too many subschemas: a kilobyte of references can stand for 2^40 of them.

    Args:
        schema: a valid JSON schema whose references all lead to places within it.

    Raises:
        InvalidOptionError: A check visits more than `MOST_STEPS` subschemas, or references are nested too deeply to be
            counted.
    """
    try:
        steps = SchemaSteps(schema).total
    except RecursionError:
        steps = MOST_STEPS + 1
    if steps > MOST_STEPS:
        raise InvalidOptionError(
            f"response_format stands for more than {MOST_STEPS} subschemas when its $ref are written out in full. "
            "Refer to a definition from fewer places."
        )


@lru_cache(maxsize=64)
def steps_of(response_format: str) -> SchemaSteps:
    return SchemaSteps(json.loads(response_format))


def refuse_patterns(response_format: str | None) -> None:
    """Refuse a stranger's regular expressions, because some of Python's never end.

    Raises:
        InvalidOptionError: The schema has a pattern.
    """
    if response_format is not None and has_pattern(json.loads(response_format)):
        raise InvalidOptionError("response_format has a regular expression (pattern), which a service does not take.")


def has_pattern(schema: Any) -> bool:
    if isinstance(schema, list):
        return any(map(has_pattern, schema))
    if not isinstance(schema, dict):
        return False
    for keyword, value in schema.items():
        if keyword in PATTERNS:
            return True
        is_named = keyword in (*NAMED, *DEFINITIONS) and isinstance(value, dict)
        inner = list(value.values()) if is_named else value
        if keyword not in (*VALUES, *NOTES) and has_pattern(inner):
            return True
    return False
