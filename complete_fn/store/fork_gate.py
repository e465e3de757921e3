"""A fork waits until no thread is in a transaction.

SQLite keeps the locks of a process's connections in the process's memory. A child that is forked during another
thread's transaction would inherit those locks for good, and would wait for itself.
"""

from __future__ import annotations

import threading

from complete_fn.host import at_fork

PATIENCE = 5.0  # seconds that a fork waits at most; then it goes ahead


class ForkGate:
    """A context that every transaction enters, also a transaction within another one of the same thread."""

    def __init__(self) -> None:
        self.open()

    def open(self) -> None:
        self.change = threading.Condition()
        self.inside = 0  # threads
        self.forking = False
        self.own = threading.local()

    @property
    def depth(self) -> int:
        return getattr(self.own, "depth", 0)

    def __enter__(self) -> None:
        if not self.depth:
            with self.change:
                self.change.wait_for(lambda: not self.forking)
                self.inside += 1
        self.own.depth = self.depth + 1

    def __exit__(self, *_: object) -> None:
        self.own.depth = self.depth - 1
        if not self.depth:
            with self.change:
                self.inside -= 1
                self.change.notify_all()

    def before_fork(self) -> None:
        with self.change:
            self.forking = True
            self.change.wait_for(lambda: self.inside == bool(self.depth), PATIENCE)

    def after_fork_in_parent(self) -> None:
        with self.change:
            self.forking = False
            self.change.notify_all()


FORKS = ForkGate()

at_fork(before=FORKS.before_fork, after_in_parent=FORKS.after_fork_in_parent, after_in_child=FORKS.open)
