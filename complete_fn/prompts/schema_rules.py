"""A service refuses a response_format with regular expressions, because strangers send it."""

from __future__ import annotations

import json
from typing import Any

from complete_fn.errors import InvalidOptionError

PATTERNS = ("pattern", "patternProperties")
NAMED = ("properties", "$defs", "definitions", "dependentSchemas")  # keys in these are names, not keywords
VALUES = ("enum", "const", "default", "examples")


def refuse_patterns(response_format: str | None) -> None:
    """Python's regular expressions check the answers. Some never end, and one would stop the whole service.

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
        inner = list(value.values()) if keyword in NAMED and isinstance(value, dict) else value
        if keyword not in VALUES and has_pattern(inner):
            return True
    return False
