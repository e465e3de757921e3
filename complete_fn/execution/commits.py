"""Slices of answers are committed every 2 s or 64 rows, together with their ledger lines.

If an engine answers faster than slices are committed, slices grow to 256 rows, and the engine waits while 1,024 rows
are uncommitted.
"""

from __future__ import annotations

import threading
import time
from types import TracebackType

from complete_fn.engines.call import Call
from complete_fn.engines.prices import amount
from complete_fn.execution.run_state import Work
from complete_fn.history.device_time import DeviceTime
from complete_fn.ledger.ledger import billed, free, times, total
from complete_fn.planning.parts import estimated_tokens
from complete_fn.progress import Progress
from complete_fn.store.records import LedgerLine
from complete_fn.store.store import SEEN_SECONDS, Store
from complete_fn.types import Asker, Completion, Usage

SLICE_ROWS, SLICE_SECONDS = 64, 2.0
MOST_ROWS, WAITING_ROWS = 256, 1024


class Slices:
    """The attempt of one run. Leaving it commits the answers left and closes the attempt as done, cancelled or failed.

    A separate thread commits. Ctrl-C is raised in the main thread only, so it can never come between a commit and the
    note in `work` that the commit was made.
    """

    def __init__(
        self,
        call: Call,
        work: Work,
        store: Store,
        who: Asker,
        progress: Progress,
        device_time: DeviceTime | None = None,
    ) -> None:
        prices = call.model.prices
        self.device_time = device_time or DeviceTime()
        self.prices, self.work, self.store, self.progress = prices, work, store, progress
        self.attempt = store.begin(who, call.model.name, prices.currency, prices.basis)
        self.copies = work.plan.copies()
        self.estimates = estimated_tokens(work.plan)
        self.admitted: set[int] = set()
        self.change = threading.Condition()
        self.waiting: list[tuple[int, Completion]] = []
        self.committing = self.due = self.stopping = False
        self.failure: BaseException | None = None
        self.committer = threading.Thread(target=self.keep_committing, daemon=True, name="complete-fn-commit")

    def __enter__(self) -> Slices:
        self.committer.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        stopped = kind is not None and not issubclass(kind, Exception)
        try:
            self.flush()
        finally:
            with self.change:
                self.stopping = True
                self.change.notify_all()
            self.committer.join()
            self.store.finish(self.attempt, "done" if kind is None else "cancelled" if stopped else "failed")

    def admit(self, numbers: list[int]) -> set[int]:
        """Note prompts as handed to the engine, and claim them; returns those that no other run computes."""
        mine = set(numbers)
        if mine and self.work.claimable:
            keys = {n: self.work.keys[n] for n in numbers}
            claimed = self.store.claim(self.attempt, list(keys.values()))
            mine = {n for n in numbers if keys[n] in claimed}
        if mine:
            self.admitted |= mine
            self.store.admit(self.attempt, len(mine), int(self.estimates[list(mine)].sum()))
        return mine

    def withdraw(self, numbers: set[int]) -> None:
        """The engine never drew these prompts, so that they are not lost with the attempt."""
        self.admitted -= numbers
        claims = {self.work.keys[n] for n in numbers} if self.work.claimable else frozenset[bytes]()
        self.store.commit(self.attempt, [], [], len(numbers), int(self.estimates[list(numbers)].sum()), claims)

    def add(self, number: int, completion: Completion) -> None:
        with self.change:
            self.waiting.append((number, completion))
            if len(self.waiting) >= SLICE_ROWS:
                self.due = True
                self.change.notify_all()
            self.change.wait_for(lambda: self.failure is not None or len(self.waiting) < WAITING_ROWS)
        self.raise_failure()

    def flush(self) -> None:
        """Commit all answers that wait; returns once they are committed."""
        with self.change:
            self.due = True
            self.change.notify_all()
            self.change.wait_for(lambda: self.failure is not None or not (self.waiting or self.committing))
        self.raise_failure()

    def raise_failure(self) -> None:
        if self.failure is not None:
            raise self.failure

    def keep_committing(self) -> None:
        seen = time.monotonic()
        while not (self.stopping or self.failure):
            with self.change:
                self.change.wait_for(lambda: self.due or self.stopping, SLICE_SECONDS)
                done, self.waiting = self.waiting[:MOST_ROWS], self.waiting[MOST_ROWS:]
                self.due = bool(self.waiting)
                self.committing = True
            try:
                self.commit(done)
                if done or time.monotonic() - seen > SEEN_SECONDS:
                    if not done:  # without answers to commit (a model loads, rows are long), report that we live
                        self.store.touch(self.attempt)
                    seen = time.monotonic()
            except BaseException as error:
                self.failure = error  # raised by the next add() or flush(), on the caller's thread
            with self.change:
                self.committing = False
                self.change.notify_all()

    def commit(self, done: list[tuple[int, Completion]]) -> None:
        """Commit one slice in one transaction: its answers, its ledger lines, and the end of its rows' claims."""
        if not done:
            return
        numbers = [n for n, _ in done]
        stored = [s for n, c in done if (s := self.work.stored(n, c)) is not None]
        admitted = [n for n in numbers if n in self.admitted]
        tokens = int(self.estimates[admitted].sum()) if admitted else 0
        claims = {self.work.keys[n] for n in admitted} if self.work.claimable else frozenset[bytes]()
        shared = self.device_time.take()
        try:
            self.store.commit(self.attempt, stored, self.lines(done) + shared, len(admitted), tokens, claims)
        except BaseException:
            self.device_time.put_back(shared)
            raise
        for number, completion in done:
            self.work.found[number] = completion
        usage = total(c.usage for _, c in done)
        self.advance(numbers, usage)

    def advance(self, numbers: list[int], usage: Usage) -> None:
        rows = int(self.copies[numbers].sum()) if numbers else 0
        if rows:
            self.progress.advance(rows, usage, amount(self.prices, usage), self.prices.currency)

    def lines(self, done: list[tuple[int, Completion]]) -> list[LedgerLine]:
        usage, engine = total(c.usage for _, c in done), self.device_time
        computed = billed(self.prices, len(done), usage, engine.skipped, engine.name)
        again = [(c.usage, int(self.copies[n]) - 1) for n, c in done]
        spared = total(times(usage, copies) for usage, copies in again)
        return computed + free(self.prices, "duplicate", sum(c for _, c in again), spared)

    def reuse(self, numbers: set[int]) -> None:
        """Write ledger lines, at no cost, for the prompts that the store answered."""
        resumed, reused = numbers & self.work.resumed, numbers - self.work.resumed
        lines = [line for kind, ns in (("resumed", resumed), ("reused", reused)) for line in self.free_line(kind, ns)]
        if lines:
            self.store.commit(self.attempt, [], lines, 0, 0)
        self.advance(sorted(numbers), Usage())

    def free_line(self, kind: str, numbers: set[int]) -> list[LedgerLine]:
        usages = [(c.usage, int(self.copies[n])) for n in numbers if (c := self.work.found[n]) is not None]
        return free(self.prices, kind, sum(c for _, c in usages), total(times(u, c) for u, c in usages))
