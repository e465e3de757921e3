"""How many workers there should be. Pure: `serve --workers` starts processes by it, a cluster may start machines."""

from __future__ import annotations

import math
from collections.abc import Mapping

from complete_fn.errors import InvalidOptionError

WORTH_SECONDS = 60.0  # another worker is started for so much work of one, which is more than most engines' start
KEEP_SECONDS = 10.0  # one that is warm is kept for less
LIKELY_RATE = 1_000.0  # tokens per second of a model that was never measured


def desired_workers(
    queued_tokens: Mapping[str, int], rates: Mapping[str, float], warm: int, least: int, most: int
) -> int:
    """The number of workers for the work there is, from `least` to `most`.

    Args:
        queued_tokens: by model, of the parts that wait or run; a model with 0 tokens is asked for all the same.
        rates: by model, tokens per second of one worker; models never measured are left out.
        warm: workers that are up.

    With work there is at least one (if `most` allows it), more work never gives fewer, and workers that are up are
    not given up before their work is nearly done.
    """
    if not queued_tokens:
        return least
    seconds = sum(tokens / (rates.get(model) or LIKELY_RATE) for model, tokens in queued_tokens.items())
    worth = math.ceil(min(most, seconds / WORTH_SECONDS))
    kept = math.ceil(min(warm, seconds / KEEP_SECONDS))
    return min(most, max(1, least, worth, kept))


def parse_workers(text: str) -> tuple[int, int]:
    """`0..4` as (0, 4), `2` as (2, 2), `0` as (0, 0): none are started here.

    Raises:
        InvalidOptionError: it is neither, or the first number is above the second.
    """
    low, dots, high = text.partition("..")
    try:
        least, most = int(low), int(high if dots else low)
    except ValueError:
        least, most = 1, 0
    if not 0 <= least <= most:
        raise InvalidOptionError(f"--workers {text!r} is not a range such as 0..2 (at least 0, at most 2 processes).")
    return least, most
