"""Ctrl-C for completions that run off the main thread, where Python delivers no signal."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import socket
import sys
import threading
import time
import weakref
from collections.abc import Iterable, Iterator

from complete_fn.engine import Engine
from complete_fn.types import Completion, CompletionRequest

POLL_SECONDS = 0.1


class Interrupts:
    """Counts interrupts of this process. Python's own wake-up socket tells any thread of a SIGINT at once.

    Only one wake-up descriptor exists per process: where another library holds it, its owner keeps it, and Ctrl-C
    then waits for the rows in flight. Handlers are left alone.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.number = 0
        self.inbox: socket.socket | None = None
        self.outbox: socket.socket | None = None

    def listen(self) -> None:
        """Ask for wake-ups; possible on the main thread only, done once."""
        if self.inbox is not None or threading.current_thread() is not threading.main_thread():
            return
        inbox, outbox = socket.socketpair()
        inbox.setblocking(False)
        outbox.setblocking(False)
        taken = signal.set_wakeup_fd(outbox.fileno(), warn_on_full_buffer=False)
        if taken != -1:
            signal.set_wakeup_fd(taken)
            inbox.close()
            outbox.close()
            return
        self.inbox, self.outbox = inbox, outbox

    def forget(self) -> None:
        """In a forked child: its signals are none of its parent's business."""
        with contextlib.suppress(ValueError):
            signal.set_wakeup_fd(-1)
        self.lock, self.inbox, self.outbox = threading.Lock(), None, None

    def count(self) -> int:
        """How many interrupts there have been."""
        with self.lock:
            if self.inbox is not None:
                with contextlib.suppress(BlockingIOError):
                    self.number += self.inbox.recv(4096).count(signal.SIGINT)
            return self.number

    def raise_all(self) -> None:
        """Interrupt every completion that is running now, as Ctrl-C would."""
        with self.lock:
            self.number += 1

    def let_finish(self, seconds: float) -> None:
        """Wait, at most so long, until the engines' threads have noticed that nobody listens any more."""
        end = time.monotonic() + seconds
        for pump in list(PUMPS):
            if pump.stopped:
                pump.join(max(0.0, end - time.monotonic()))


INTERRUPTS = Interrupts()
PUMPS: weakref.WeakSet[Pump] = weakref.WeakSet()
if sys.platform != "win32":
    os.register_at_fork(after_in_child=INTERRUPTS.forget)


class Interruptible:
    """An engine whose stream ends with KeyboardInterrupt within 0.1 s of an interrupt, whatever it is blocked in.

    The engine runs on a thread of its own; the caller's thread only takes finished rows, so what is finished is
    committed before the interrupt gets out. What is then still in flight is thrown away.
    """

    def __init__(self, engine: Engine, interrupts: Interrupts = INTERRUPTS) -> None:
        self.engine, self.interrupts = engine, interrupts
        self.seen = interrupts.count()

    def stream(self, requests: Iterable[CompletionRequest], tenant: str) -> Iterator[tuple[int, Completion]]:
        pump = Pump(self.engine, requests, tenant)
        pump.start()
        looked = time.monotonic()
        try:
            while True:
                try:
                    item = pump.done.get(timeout=POLL_SECONDS)
                except queue.Empty:
                    item = ()
                if isinstance(item, BaseException):
                    raise item
                if item is None:
                    return
                if item:
                    yield item
                if not item or time.monotonic() - looked > POLL_SECONDS:
                    looked = time.monotonic()
                    if self.interrupts.count() != self.seen:
                        raise KeyboardInterrupt("the query was interrupted; finished rows are kept")
        finally:
            pump.stop()
            del pump  # a traceback would keep the thread, whose end then meets the pending signal and prints it

    def count_tokens(self, texts: list[str]) -> list[int]:
        return self.engine.count_tokens(texts)

    def close(self) -> None:
        self.engine.close()


class Pump(threading.Thread):
    """Moves completions from the engine into `done`: (position, completion), then None or the exception."""

    def __init__(self, engine: Engine, requests: Iterable[CompletionRequest], tenant: str) -> None:
        super().__init__(daemon=True, name="complete-fn-pump")
        self.engine, self.requests, self.tenant = engine, iter(requests), tenant
        self.done: queue.SimpleQueue[tuple[int, Completion] | tuple[()] | BaseException | None] = queue.SimpleQueue()
        self.gate = threading.Lock()
        self.stopped = False
        PUMPS.add(self)

    def run(self) -> None:
        stream = self.engine.stream(self.admitted(), self.tenant)
        try:
            for item in stream:
                self.done.put(item)
                if self.stopped:
                    break
            self.done.put(None)
        except BaseException as error:
            self.done.put(error)
        finally:
            if isinstance(stream, Iterator) and hasattr(stream, "close"):
                stream.close()

    def admitted(self) -> Iterator[CompletionRequest]:
        """The requests until stopped: none is drawn, and no money reserved, after stop() has returned."""
        while True:
            with self.gate:
                request = None if self.stopped else next(self.requests, None)
            if request is None:
                return
            yield request

    def stop(self) -> None:
        with self.gate:
            self.stopped = True
