"""Periodic tasks: each runs at its own interval, and the failure of one stops no other."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from complete_fn.logs import log_failure


@dataclass
class PeriodicTask:
    """Calls `what` every `seconds`, for the first time at once."""

    seconds: float
    what: Callable[[], object]
    due: float = 0.0


def run_due_tasks(tasks: Iterable[PeriodicTask]) -> None:
    """Run the tasks that are due. A failure is logged, and the task runs again at its next time."""
    for task in tasks:
        now = time.monotonic()
        if now >= task.due:
            task.due = now + task.seconds
            try:
                task.what()
            except Exception as error:
                log_failure("upkeep", error)
