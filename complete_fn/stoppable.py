"""An engine whose streams end when somebody says so, also while they wait for a row."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress

from complete_fn.engine import Engine
from complete_fn.runner import close
from complete_fn.types import Completion, CompletionRequest

POLL_SECONDS = 0.1
AHEAD = 256  # outcomes that wait for a slow disk
Outcome = tuple[int, Completion] | BaseException | None


class Stopped(BaseException):
    """The run was told to stop. Like KeyboardInterrupt no `Exception`: its attempt counts as cancelled."""


class StoppableEngine:
    """`engine`, whose streams raise `Stopped` within a moment of `stop` being set. What is in flight is aborted."""

    def __init__(self, engine: Engine, stop: threading.Event) -> None:
        self.engine = engine
        self.stop = stop

    def stream(self, requests: Iterable[CompletionRequest], tenant: str) -> Iterator[tuple[int, Completion]]:
        gate = Gate(requests, self.stop)
        outcomes: queue.Queue[Outcome] = queue.Queue(AHEAD)
        threading.Thread(target=pump, args=(self.engine, gate, tenant, outcomes), daemon=True).start()
        try:
            while (outcome := self.wait_for(outcomes)) is not None:
                if isinstance(outcome, BaseException):
                    raise outcome
                yield outcome
            if self.stop.is_set():
                raise Stopped
        finally:
            gate.close()

    def wait_for(self, outcomes: queue.Queue[Outcome]) -> Outcome:
        """The next outcome; what is done already is given out before `Stopped` is raised."""
        while True:
            with suppress(queue.Empty):
                return outcomes.get(timeout=POLL_SECONDS)
            if self.stop.is_set():
                raise Stopped

    def count_tokens(self, texts: list[str]) -> list[int]:
        return self.engine.count_tokens(texts)

    def close(self) -> None:
        self.engine.close()


def stoppable_pause(stop: threading.Event, seconds: float) -> None:
    if stop.wait(seconds):
        raise Stopped


class Gate:
    """Hands requests on until it is closed. Once `close` has returned, the caller's iterable is not drawn from."""

    def __init__(self, requests: Iterable[CompletionRequest], stop: threading.Event) -> None:
        self.requests = iter(requests)
        self.stop = stop
        self.lock = threading.Lock()
        self.closed = False

    def __iter__(self) -> Iterator[CompletionRequest]:
        return self

    def __next__(self) -> CompletionRequest:
        with self.lock:
            if self.closed or self.stop.is_set():
                raise StopIteration
            return next(self.requests)

    @property
    def abandoned(self) -> bool:
        """As in `Engine.stream`: nobody wants the rows that are still in flight."""
        return self.closed or self.stop.is_set()

    def close(self) -> None:
        with self.lock:
            self.closed = True


def pump(engine: Engine, gate: Gate, tenant: str, outcomes: queue.Queue[Outcome]) -> None:
    """Runs the engine's stream on a thread of its own: a generator can only be closed where it runs."""
    last: Outcome = None
    try:
        stream = engine.stream(gate, tenant)
        for outcome in stream:
            if not put(outcomes, outcome, gate) or gate.stop.is_set():
                break
        close(stream)
    except BaseException as error:
        last = error
    put(outcomes, last, gate)


def put(outcomes: queue.Queue[Outcome], outcome: Outcome, gate: Gate) -> bool:
    """Whether the outcome could be put: False once nobody takes any more."""
    while not gate.closed:
        with suppress(queue.Full):
            outcomes.put(outcome, timeout=POLL_SECONDS)
            return True
    return False
