"""`desired_workers`, a pure function, tells how many workers there should be. `serve --workers` starts processes by it.

A cluster may start machines by it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from complete_fn.errors import InvalidOptionError

WORTH_SECONDS = 60.0  # work of one worker for which another is started; longer than most engines take to start
KEEP_SECONDS = 10.0  # work of one worker for which a warm worker is kept
LIKELY_RATE = 1_000.0  # tokens per second assumed for a model that was never measured


def desired_workers(
    queued_tokens: Mapping[str, int], rates: Mapping[str, float], warm: int, least: int, most: int
) -> int:
    """The number of workers for the present work, from `least` to `most`.

    Args:
        queued_tokens: by model, tokens of the parts that wait or run; a model with 0 tokens needs a worker too.
        rates: by model, tokens per second of one worker; models never measured are left out.
        warm: workers that are up.

    With any work there is at least one worker (if `most` allows it). More work never gives fewer workers. Workers that
    are up stay until their work is nearly done.
    """
    if not queued_tokens:
        return least
    seconds = sum(tokens / (rates.get(model) or LIKELY_RATE) for model, tokens in queued_tokens.items())
    worth = math.ceil(min(most, seconds / WORTH_SECONDS))
    kept = math.ceil(min(warm, seconds / KEEP_SECONDS))
    return min(most, max(1, least, worth, kept))


def parse_workers(text: str) -> tuple[int, int]:
    """The bounds that --workers gives: `0..4` is (0, 4), `2` is (2, 2), and `0` is (0, 0), so that none start here.

    Raises:
        InvalidOptionError: The text is neither a number nor a range, or the first number is above the second.
    """
    low, dots, high = text.partition("..")
    try:
        least, most = int(low), int(high if dots else low)
    except ValueError:
        least, most = 1, 0
    if not 0 <= least <= most:
        raise InvalidOptionError(f"--workers {text!r} is not a range such as 0..2 (at least 0, at most 2 processes).")
    return least, most
