"""Engine slots decide which models have an engine in this process, and which model gets the next free slot."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from complete_fn.engines.stoppable import Stop, Stopped

TURN_SECONDS = 60.0  # a model that has work keeps its slot at least this long while other models wait
TURN_STARTS = 10.0  # or this many times its engine's start time, so that starts take a small share of all time
GRACE_SECONDS = 1.0  # a model without a run for a shorter time is not idle: it may be between two pieces of work
LOOK_SECONDS = 0.1  # between two looks of a waiting run at its stop
ACCELERATORS = (Path("/proc/driver/nvidia/version"), Path("/dev/kfd"))  # NVIDIA, AMD


def usual_engines() -> int | None:
    """The usual bound of engines at once: 1 on an accelerator, whose memory vLLM takes for one engine; None on CPUs."""
    return 1 if any(path.exists() for path in ACCELERATORS) else None


@dataclass
class Seat:
    """A model's slot.

    Attributes:
        since: when the model got the slot.
        last_used: when its last run ended.
        bounded: whether the engine counts towards the most engines at once.
        running: runs that use the engine now.
        leaving: the engine is being closed, so no run may enter.
    """

    since: float
    last_used: float
    bounded: bool
    running: int = 0
    leaving: bool = False


class EngineRoom:
    """Admits runs to their models' engines. Safe to use from several threads.

    Args:
        most: engines at once; None sets no bound.
        unload: closes a model's engine; no run uses the engine before `unload` returns.
        started: seconds that a model's engine took to start, or None if not known.
    """

    def __init__(
        self,
        most: int | None,
        unload: Callable[[str], None],
        started: Callable[[str], float | None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.most, self.unload, self.started, self.clock = most, unload, started, clock
        self.changed = threading.Condition()
        self.seats: dict[str, Seat] = {}
        self.waiting: dict[str, list[float]] = {}  # by model, when each waiting run came

    @contextmanager
    def place(self, model: str, stop: Stop, bounded: bool = True) -> Iterator[None]:
        """Admit one run. If no slot is free, it waits until another model's engine has no work or has had its turn.

        Args:
            bounded: whether the engine counts towards `most`; an engine on another machine does not.

        Raises:
            Stopped: `stop` was set during the wait.
        """
        self.enter(model, stop, bounded)
        try:
            yield
        finally:
            with self.changed:
                seat = self.seats[model]
                seat.running, seat.last_used = seat.running - 1, self.clock()
                self.changed.notify_all()

    def enter(self, model: str, stop: Stop, bounded: bool) -> None:
        came = self.clock()
        try:
            while True:
                with self.changed:
                    if self.seated(model, bounded):
                        return
                    if came not in self.waiting.setdefault(model, []):
                        self.waiting[model].append(came)
                    idle = self.idle() if self.first() == model else None
                    if idle is None:
                        self.changed.wait(LOOK_SECONDS)
                if idle is not None:
                    self.vacate(idle)
                if stop.is_set():
                    raise Stopped
        finally:
            with self.changed:
                if came in self.waiting.get(model, ()):
                    self.waiting[model].remove(came)
                self.waiting = {name: since for name, since in self.waiting.items() if since}
                self.changed.notify_all()

    def seated(self, model: str, bounded: bool) -> bool:
        """Admit the run if it may start; then it counts as running.

        The caller holds the lock, here and in the methods below up to `idle`.
        """
        seat = self.seats.get(model)
        if seat is None:
            if bounded and (self.full() or self.first() not in (None, model)):
                return False
            seat = self.seats[model] = Seat(self.clock(), self.clock(), bounded)
        elif seat.leaving or (seat.bounded and self.first() is not None and self.turn_is_over(model)):
            return False
        seat.running += 1
        return True

    def full(self) -> bool:
        return self.most is not None and sum(seat.bounded for seat in self.seats.values()) >= self.most

    def outside(self) -> list[str]:
        """The models that wait for a slot, the longest waiting first."""
        return sorted((m for m in self.waiting if m not in self.seats), key=lambda m: self.waiting[m][0])

    def first(self) -> str | None:
        return next(iter(self.outside()), None)

    def turn_is_over(self, model: str) -> bool:
        turn = max(TURN_SECONDS, TURN_STARTS * (self.started(model) or 0.0))
        return self.clock() - self.seats[model].since > turn

    def idle(self, seconds: float | None = None) -> str | None:
        """The model that has been without work for longest, and for at least `seconds`; it is marked as leaving.

        Without `seconds`: after `GRACE_SECONDS`, and only a model whose slot another model can use.
        """
        before = self.clock() - (GRACE_SECONDS if seconds is None else seconds)
        still = {
            model: seat.last_used
            for model, seat in self.seats.items()
            if not seat.running and not seat.leaving and seat.last_used <= before
            if seconds is not None or seat.bounded
        }
        if not still:
            return None
        model = min(still, key=lambda m: still[m])
        self.seats[model].leaving = True
        return model

    def vacate(self, model: str) -> None:
        try:
            self.unload(model)
        finally:
            with self.changed:
                del self.seats[model]
                self.changed.notify_all()

    def vacate_idle(self, seconds: float) -> None:
        """Close the engines that have been without work for so long."""
        while True:
            with self.changed:
                model = self.idle(seconds)
            if model is None:
                return
            self.vacate(model)

    def next_models(self, deserted: Callable[[], bool]) -> list[str | None]:
        """The models whose parts may be claimed here, in order of preference; None means any model.

        1. A model with a slot whose turn is not over, so that two models do not change places with every part.
        2. The model that waits for a slot.
        3. If every worker has abandoned a model with queued parts (`deserted`), any model.
        """
        with self.changed:
            if not self.full():
                return [None]
            seated = [model for model, seat in self.seats.items() if seat.bounded and not seat.leaving]
            in_turn: list[str | None] = [model for model in seated if not self.turn_is_over(model)]
            waiting = self.first()
        if waiting is not None:
            return in_turn or [waiting]
        return [*in_turn, None] if len(in_turn) < len(seated) and deserted() else [*seated, None]
