"""The option `choices` limits answers to a few labels. This module checks the list and bounds an answer's tokens."""

from __future__ import annotations

from typing import Any

from complete_fn.errors import InvalidOptionError
from complete_fn.text import is_utf8

MOST_LABELS, LABEL_CHARACTERS = 128, 256  # vLLM scores at most 128 tokens in a step
JSON_TOKENS = 32  # tokens of the JSON around a label in an endpoint's answer; a generous bound


def parse_choices(given: Any) -> tuple[str, ...]:
    """The labels in the given order.

    Raises:
        InvalidOptionError: The value is no list of 2 to 128 different texts; or a label is blank, has more than 256
            characters, white space at an end or half of a character.
    """
    if not isinstance(given, list | tuple) or not all(isinstance(label, str) for label in given):
        raise InvalidOptionError(f"choices = {given!r} is not a list of texts. Write ['yes', 'no'].")
    if not 2 <= len(given) <= MOST_LABELS:
        counted = f"{len(given)} label{'s' * (len(given) != 1)}"
        raise InvalidOptionError(
            f"choices has {counted}; 2 to {MOST_LABELS} are taken. Choose in two steps, a group and then a member, "
            "where there are more."
        )
    for number, label in enumerate(given):
        if label != label.strip() or not label:
            raise InvalidOptionError(f"choices has {label!r}: a label is not blank and has no white space at its ends.")
        if len(label) > LABEL_CHARACTERS:
            raise InvalidOptionError(
                f"choices has a label of {len(label)} characters ({label[:30]!r}...); at most {LABEL_CHARACTERS} are "
                "taken. Describe it in the prompt and give it a short name."
            )
        if label in given[:number]:
            raise InvalidOptionError(f"choices has {label!r} twice. Name each label once.")
        if not is_utf8(label):
            raise InvalidOptionError(f"choices has {label!r}, with half of a character (a lone surrogate).")
    return tuple(given)


def most_tokens(choices: tuple[str, ...], engine: str) -> int:
    """The most tokens that an answer takes.

    An engine of ours takes one token for each place where labels differ, an endpoint the longest label's tokens in
    JSON. A token is at least a byte, so the label's bytes are the bound.
    """
    if engine == "http":
        return max(len(label.encode()) for label in choices) + JSON_TOKENS
    return len(choices) - 1
