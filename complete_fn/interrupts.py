"""Ctrl-C ends the completions of this process on whatever thread they run, and keeps what is finished.

Work for a client who may leave ends too: see `abandonable`.
"""

from __future__ import annotations

import _thread
import contextlib
import queue
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import partial, wraps
from typing import Generic, ParamSpec, TypeVar

from complete_fn.host import renew_in_child

POLL_SECONDS, GRACE_SECONDS = 0.1, 2.0
T = TypeVar("T")
P = ParamSpec("P")


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

    def after_fork(self) -> None:
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


INTERRUPTS = Interrupts()
renew_in_child(INTERRUPTS)


class NextInterrupt:
    """Set by the first interrupt from now on; stands where a threading.Event would."""

    def __init__(self, interrupts: Interrupts = INTERRUPTS) -> None:
        self.interrupts, self.seen = interrupts, interrupts.count()

    def is_set(self) -> bool:
        return self.interrupts.count() != self.seen

    def wait(self, seconds: float, /) -> bool:
        """Whether it was set within so many seconds."""
        end = time.monotonic() + seconds
        while not self.is_set() and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, POLL_SECONDS))
        return self.is_set()


def uninterrupted(work: Callable[[], T], interrupt: Callable[[], None] = INTERRUPTS.raise_all) -> T:
    """`work()`, never on the main thread: Ctrl-C calls `interrupt`, then waits a moment for `work` to end by itself.

    Python raises KeyboardInterrupt in the main thread after any call, also between a lock's acquire and the `with`
    that would release it: `threading.Condition.__enter__` has such a place. Whoever needs that lock then waits for
    ever. So the main thread takes no such lock; it only waits, in C.
    """
    if threading.current_thread() is not threading.main_thread():
        return work()
    ended: queue.SimpleQueue[Outcome[T]] = queue.SimpleQueue()
    gone: queue.SimpleQueue[None] = queue.SimpleQueue()  # `ended` may be empty because the outcome was taken

    def go() -> None:
        ended.put(Outcome(work))
        gone.put(None)

    try:
        _thread.start_new_thread(go, ())  # Thread.start() takes a Condition
        outcome = None
        while outcome is None:  # polars' handler restarts what a signal breaks off, so nothing may wait for long
            with contextlib.suppress(queue.Empty):
                outcome = ended.get(timeout=POLL_SECONDS)
    except BaseException:
        interrupt()
        with contextlib.suppress(queue.Empty):
            gone.get(timeout=GRACE_SECONDS)  # what is finished is committed meanwhile
        raise
    return outcome.take()


def off_main(function: Callable[P, T]) -> Callable[P, T]:
    """Decorates what works with the store and may be called on the main thread: see `uninterrupted`."""

    @wraps(function)
    def wrapped(*arguments: P.args, **named: P.kwargs) -> T:
        return uninterrupted(partial(function, *arguments, **named))

    return wrapped


class Outcome(Generic[T]):
    """What a call returned or raised."""

    def __init__(self, work: Callable[[], T]) -> None:
        self.error: BaseException | None = None
        try:
            self.value = work()
        except BaseException as error:
            self.error = error

    def take(self) -> T:
        if self.error is None:
            return self.value
        try:
            raise self.error
        finally:
            self.error = None  # no cycle of frames, which would keep the run's tables


class Abandoned(Exception):
    """Nobody waits for this work's result any more. What it began must be undone."""


GONE: ContextVar[threading.Event | None] = ContextVar("gone", default=None)


@contextlib.contextmanager
def abandonable(gone: threading.Event) -> Iterator[None]:
    """Work inside of the block ends at its next `end_if_abandoned()` once `gone` is set. For the block's own thread."""
    token = GONE.set(gone)
    try:
        yield
    finally:
        GONE.reset(token)


def end_if_abandoned() -> None:
    """Called between two steps of long work: for each batch of rows, each part, each pass of a plan.

    Raises:
        Abandoned: Nobody waits for the work any more.
    """
    gone = GONE.get()
    if gone is not None and gone.is_set():
        raise Abandoned
