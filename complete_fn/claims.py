"""Who computes what, among the threads of this process: one prompt asked twice at the same time is computed once."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable

Key = tuple[str, bytes]


class Claims:
    """Claimed keys, each with an event that is set when its answer is committed or given up."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.events: dict[Key, threading.Event] = {}
        self.releases = 0  # how often keys were let go: answers may have come into the store since

    def take(self, tenant: str, keys: Iterable[bytes]) -> tuple[set[bytes], dict[bytes, threading.Event]]:
        """(keys now mine, events of those that another run is computing)."""
        mine: set[bytes] = set()
        done = threading.Event()  # one for all keys of the call: they are let go together
        theirs: dict[bytes, threading.Event] = {}
        with self.lock:
            for key in keys:
                event = self.events.get((tenant, key))
                if event is None:
                    self.events[tenant, key] = done
                    mine.add(key)
                elif key not in mine:
                    theirs[key] = event
        return mine, theirs

    def release(self, tenant: str, keys: Iterable[bytes]) -> None:
        with self.lock:
            self.releases += 1
            events = {event for key in keys if (event := self.events.pop((tenant, key), None))}
        for event in events:
            event.set()


CLAIMS = Claims()


def after_fork() -> None:
    """A forked child has none of the threads that would release these claims."""
    CLAIMS.lock = threading.Lock()
    CLAIMS.events.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=after_fork)
