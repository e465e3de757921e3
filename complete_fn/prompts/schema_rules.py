"""What a service does not take in a response_format that strangers send."""

from __future__ import annotations

import json
from typing import Any

from complete_fn.errors import InvalidOptionError

PATTERNS = ("pattern", "patternProperties")
NAMED = ("properties", "$defs", "definitions", "dependentSchemas")  # their keys are names, not keywords
VALUES = ("enum", "const", "default", "examples")


def refuse_patterns(response_format: str | None) -> None:
    """Answers are checked with Python's regular expressions, some of which never end and would stop the whole service.

    Raises:
        InvalidOptionError: the schema has a pattern.
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
