"""An answer's text must satisfy response_format or choices. This module checks it, whatever the engine promised."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from complete_fn.engines.answer_check import mismatch
from complete_fn.types import Completion, CompletionRequest, RowError


def checked(completion: Completion, request: CompletionRequest) -> Completion:
    """The completion, with the error `schema_mismatch` if its text breaks the JSON schema or is none of the choices.

    The text is kept beside the error.
    """
    if completion.error is not None or completion.text is None:
        return completion
    if request.choices:
        return chosen(completion, request.choices)
    if request.response_format is None:
        return completion
    why = mismatch(completion.text, request.response_format)
    if why is None:
        return completion
    if completion.finish_reason == "length":
        why = f"The answer was cut by max_tokens before its JSON was complete ({why})."
    return replace(completion, error=RowError("schema_mismatch", why))


def chosen(completion: Completion, choices: tuple[str, ...]) -> Completion:
    """The completion with its label as text. The answer is the label, or a JSON object as in `choice_schema`."""
    text = (completion.text or "").strip()
    if text not in choices:
        try:
            found = json.loads(text)["choice"]
        except (ValueError, KeyError, TypeError, RecursionError):
            found = None
        if found not in choices:
            listed = ", ".join(choices[:5]) + (", ..." if len(choices) > 5 else "")
            why = f"The answer {text[:100]!r} is none of the choices ({listed})."
            return replace(completion, error=RowError("schema_mismatch", why))
        text = found
    return replace(completion, text=text)


def choice_schema(choices: tuple[str, ...]) -> dict[str, Any]:
    """The choices as a JSON schema, for endpoints that have no other way to restrict an answer."""
    one = {"type": "string", "enum": list(choices)}
    return {"type": "object", "properties": {"choice": one}, "required": ["choice"], "additionalProperties": False}
