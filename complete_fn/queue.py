"""How workers learn that there is work. A message only says so; what it is, a worker claims from the store."""

from __future__ import annotations

import threading
from typing import Protocol


class JobQueue(Protocol):
    """Losing or repeating a message does no harm: workers look into the store now and then anyway."""

    def notify(self) -> None:
        """There is work."""
        ...

    def wait(self, seconds: float) -> None:
        """Return when there may be work, at the latest after so long."""
        ...


class InlineQueue:
    """The queue of workers that are threads of the same process."""

    def __init__(self) -> None:
        self.news = threading.Condition()

    def notify(self) -> None:
        with self.news:
            self.news.notify_all()

    def wait(self, seconds: float) -> None:
        with self.news:
            self.news.wait(seconds)
