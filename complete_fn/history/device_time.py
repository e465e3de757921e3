"""Device time of an engine that is in no row's answer: idle, and spent on rows that were given up.

An engine that meters its devices has an attribute `device_time`. Between the engine's load and its last word, the rows'
`Usage.device_seconds`, `idle` and `lost` add up to `metered`, apart from rows still under way. What is noted nowhere:
the load itself, what a killed child or parent had not yet told, and what comes after the last delivery of a process
that ends without letting its engine go in order.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from complete_fn.engines.catalogue import Model
from complete_fn.store.records import LedgerLine
from complete_fn.store.store import Store


class DeviceTime:
    """Seconds of one engine's devices. Safe to use from several threads.

    Attributes:
        name: of the engine, HOST/PID.
        skipped: share of a prompt token's FLOPs that the model's SwiftKV layers skip, 0 for other models.
        metered, idle, lost: device-seconds since the engine was loaded, as told to this process.
    """

    def __init__(self, ask: Callable[[], None] = lambda: None) -> None:
        """Args: ask: has the engine tell its time now."""
        self.ask = ask
        self.name: str | None = None
        self.skipped = 0.0
        self.metered = self.idle = self.lost = 0.0
        self.taken = {"idle": 0, "aborted": 0}
        self.lock = threading.Lock()

    def told(self, metered: float, idle: float, lost: float) -> None:
        """`metered` since the engine was loaded, `idle` and `lost` since it last told anybody."""
        with self.lock:
            self.metered = max(self.metered, metered)
            self.idle += idle
            self.lost += lost

    def take(self) -> list[LedgerLine]:
        """Lines of what no line has yet, in whole microseconds; `put_back` them if they are not written."""
        with self.lock:
            left = {"idle": round(self.idle * 1e6), "aborted": round(self.lost * 1e6)}
            lines = [
                LedgerLine(kind, 0, 0, device_us=now - self.taken[kind], engine=self.name)
                for kind, now in left.items()
                if now > self.taken[kind]
            ]
            for line in lines:
                self.taken[line.price_class] += line.device_us
        return lines

    def put_back(self, lines: list[LedgerLine]) -> None:
        with self.lock:
            for line in lines:
                self.taken[line.price_class] -= line.device_us


def device_time_of(engine: object) -> DeviceTime | None:
    """Of an engine that meters its devices; one within another is asked."""
    while engine is not None:
        if isinstance(found := getattr(engine, "device_time", None), DeviceTime):
            return found
        engine = getattr(engine, "engine", None)
    return None


def note_device_time(store: Store, engine: object, model: Model) -> None:
    """Write the lines of an engine that is about to be let go."""
    found = device_time_of(engine)
    if found is None:
        return
    found.ask()
    lines = found.take()
    if not lines:
        return
    try:
        store.note(model.name, model.prices.currency, model.prices.basis, lines)
    except BaseException:
        found.put_back(lines)
        raise
