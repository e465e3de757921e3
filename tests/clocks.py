"""`pass_time` moves a store's clock; `shifted_clock` is for a process of a host whose clock is wrong."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa

from complete_fn.store.clock import StoreClock
from complete_fn.store.store import Store


@dataclass
class MovedClock:
    clock: StoreClock
    seconds: float

    def now(self) -> float:
        return self.clock.now() + self.seconds

    def compare(self, connection: sa.Connection) -> None:
        self.clock.compare(connection)

    def difference(self) -> str | None:
        return self.clock.difference()


def pass_time(store: Store, seconds: float) -> None:
    store.database.clock = MovedClock(store.database.clock, seconds)


def shifted_clock(folder: Path, seconds: float) -> dict[str, str]:
    """Environment of a Python process whose `time.time` is `seconds` ahead of the machine's."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text(f"import time\nreal = time.time\ntime.time = lambda: real() + {seconds}\n")
    return {"PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}
