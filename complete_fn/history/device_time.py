"""`DeviceTime` collects an engine's device time that no answer counts: idle time, and time for rows that were given up.

An engine that meters its devices has an attribute `device_time`. From the engine's load to its last report, the rows'
`Usage.device_seconds`, `idle` and `lost` add up to `metered`, apart from rows still under way. Three times are noted
nowhere: the load itself, time that a killed child or parent had not yet reported, and time after the last delivery of
a process that ends without closing its engine.
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
        name: the engine's HOST/PID.
        skipped: share of a prompt token's FLOPs that the model's SwiftKV layers skip; 0 for other models.
        metered, idle, lost: device-seconds since the engine was loaded, as reported to this process.
    """

    def __init__(self, ask: Callable[[], None] = lambda: None) -> None:
        """Args: ask: makes the engine report its time now."""
        self.ask = ask
        self.name: str | None = None
        self.skipped = 0.0
        self.metered = self.idle = self.lost = 0.0
        self.taken = {"idle": 0, "aborted": 0}
        self.lock = threading.Lock()

    def told(self, metered: float, idle: float, lost: float) -> None:
        """Add a report: `metered` since the engine was loaded, `idle` and `lost` since its last report."""
        with self.lock:
            self.metered = max(self.metered, metered)
            self.idle += idle
            self.lost += lost

    def take(self) -> list[LedgerLine]:
        """Ledger lines of the time that no line has yet, in whole microseconds. `put_back` them if writing fails."""
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
    """The device time of an engine that meters its devices, or of the engine that it wraps; else None."""
    while engine is not None:
        if isinstance(found := getattr(engine, "device_time", None), DeviceTime):
            return found
        engine = getattr(engine, "engine", None)
    return None


def note_device_time(store: Store, engine: object, model: Model) -> None:
    """Write the last ledger lines of an engine that is about to be closed."""
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
