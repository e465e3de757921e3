"""A `StoppableEngine` ends its streams when a stop is set, even while they wait for a row."""

from __future__ import annotations

import queue
import threading
import time
import weakref
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Protocol

from complete_fn.engines.base import Engine, close
from complete_fn.interrupts import POLL_SECONDS
from complete_fn.types import Completion, CompletionRequest

AHEAD = 256  # outcomes that may wait while the caller writes to a slow disk
Outcome = tuple[int, Completion] | BaseException | None


class Stopped(BaseException):
    """The run was told to stop. Like KeyboardInterrupt it is no `Exception`, so the attempt counts as cancelled."""


class Stop(Protocol):
    """A signal to stop: a threading.Event, or an `interrupts.NextInterrupt`."""

    def is_set(self) -> bool: ...

    def wait(self, seconds: float, /) -> bool: ...


class EitherStop:
    """A stop that is set once one of two stops is set."""

    def __init__(self, one: Stop, other: Stop) -> None:
        self.one, self.other = one, other

    def is_set(self) -> bool:
        return self.one.is_set() or self.other.is_set()

    def wait(self, seconds: float, /) -> bool:
        """Whether one of the stops was set within so many seconds."""
        end = time.monotonic() + seconds
        while not self.is_set() and (left := end - time.monotonic()) > 0:
            self.one.wait(min(left, POLL_SECONDS))
        return self.is_set()


class StoppableEngine:
    """Wraps an engine so that its streams raise `error` as soon as `stop` is set. Requests in flight are aborted.

    The engine runs on its own thread, so that an engine that blocks cannot delay the stop.
    """

    def __init__(self, engine: Engine, stop: Stop, error: type[BaseException] = Stopped, why: str = "") -> None:
        self.engine, self.stop = engine, stop
        self.error, self.why = error, why

    def stream(self, requests: Iterable[CompletionRequest], tenant: str) -> Iterator[tuple[int, Completion]]:
        gate = Gate(requests, self.stop)
        outcomes: queue.Queue[Outcome] = queue.Queue(AHEAD)
        Pump(self.engine, gate, tenant, outcomes).start()
        try:
            while (outcome := self.wait_for(outcomes)) is not None:
                if isinstance(outcome, BaseException):
                    raise outcome
                yield outcome
            self.check()
        finally:
            gate.close()

    def wait_for(self, outcomes: queue.Queue[Outcome]) -> Outcome:
        """The next outcome. Outcomes that are already done are returned before the stop is raised."""
        while True:
            with suppress(queue.Empty):
                return outcomes.get(timeout=POLL_SECONDS)
            self.check()

    def check(self) -> None:
        if self.stop.is_set():
            raise self.error(self.why)

    def pause(self, seconds: float) -> None:
        """Wait so long, or raise the stop's error (for `Tools.pause`)."""
        if self.stop.wait(seconds):
            raise self.error(self.why)

    def count_tokens(self, texts: list[str]) -> list[int]:
        return self.engine.count_tokens(texts)

    def close(self) -> None:
        self.engine.close()


class Gate:
    """Passes requests on until it is closed. After `close` has returned, nothing draws from the caller's iterable."""

    def __init__(self, requests: Iterable[CompletionRequest], stop: Stop) -> None:
        self.requests = iter(requests)
        self.stop = stop
        self.lock = threading.Lock()
        self.closed = False

    def __iter__(self) -> Iterator[CompletionRequest]:
        return self

    def __next__(self) -> CompletionRequest:
        with self.lock:
            if self.abandoned:
                raise StopIteration
            return next(self.requests)

    @property
    def abandoned(self) -> bool:
        """Whether the engine must abort the rows in flight, as `Engine.stream` says."""
        return self.closed or self.stop.is_set()

    def close(self) -> None:
        with self.lock:
            self.closed = True


PUMPS: weakref.WeakSet[Pump] = weakref.WeakSet()


class Pump(threading.Thread):
    """Runs and closes the engine's stream on its own thread: no other thread can close a generator that runs."""

    def __init__(self, engine: Engine, gate: Gate, tenant: str, outcomes: queue.Queue[Outcome]) -> None:
        super().__init__(daemon=True, name="complete-fn-pump")
        self.engine, self.gate, self.tenant, self.outcomes = engine, gate, tenant, outcomes
        PUMPS.add(self)

    def run(self) -> None:
        last: Outcome = None
        try:
            stream = self.engine.stream(self.gate, self.tenant)
            for outcome in stream:
                if not self.put(outcome) or self.gate.stop.is_set():
                    break
            close(stream)
        except BaseException as error:
            last = error
        self.put(last)

    def put(self, outcome: Outcome) -> bool:
        """Queue the outcome. Returns False if the stream's caller is gone."""
        while not self.gate.closed:
            with suppress(queue.Full):
                self.outcomes.put(outcome, timeout=POLL_SECONDS)
                return True
        return False


def let_finish(seconds: float) -> None:
    """Wait, at most so long, until the threads of closed streams have ended."""
    end = time.monotonic() + seconds
    for pump in list(PUMPS):
        if pump.gate.closed:
            pump.join(max(0.0, end - time.monotonic()))
