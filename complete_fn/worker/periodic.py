"""What a service does over and over: each thing at its own pace, and none stopped by another's failure."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from complete_fn.logs import log


@dataclass
class PeriodicTask:
    """`what` is done every `seconds`, the first time at once."""

    seconds: float
    what: Callable[[], object]
    due: float = 0.0


def run_due_tasks(turns: Iterable[PeriodicTask]) -> None:
    """Do what is due. A failure is logged; its turn comes again."""
    for turn in turns:
        now = time.monotonic()
        if now >= turn.due:
            turn.due = now + turn.seconds
            try:
                turn.what()
            except Exception as error:
                log("upkeep", error)
