"""Slices: answers gathered and committed at least every 2 s or 256 rows, together with their ledger lines."""

from __future__ import annotations

import threading
from types import TracebackType

from complete_fn.keys import Call
from complete_fn.ledger import LedgerLine, billed, free, times, total
from complete_fn.plan.parts import estimated_tokens
from complete_fn.prices import amount
from complete_fn.progress import Progress
from complete_fn.store import Store
from complete_fn.types import Asker, Completion
from complete_fn.work import Work

SLICE_ROWS, SLICE_SECONDS = 256, 2.0


class Slices:
    """The attempt of one run. Leaving it commits what is left and closes the attempt as done, cancelled or failed."""

    def __init__(self, call: Call, work: Work, store: Store, who: Asker, progress: Progress) -> None:
        prices = call.model.prices
        self.prices, self.work, self.store, self.progress = prices, work, store, progress
        self.attempt = store.begin(who, call.model.name, prices.currency, prices.basis)
        self.copies = work.plan.copies()
        self.estimates = estimated_tokens(work.plan)
        self.waiting: list[tuple[int, Completion]] = []
        self.lock = threading.Lock()
        self.stopped = threading.Event()
        self.failure: BaseException | None = None
        self.clock = threading.Thread(target=self.tick, daemon=True, name="complete-fn-commit")

    def __enter__(self) -> Slices:
        self.clock.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.stopped.set()
        self.clock.join()
        self.flush()
        stopped = kind is not None and not issubclass(kind, Exception)
        self.store.finish(self.attempt, "done" if kind is None else "cancelled" if stopped else "failed")

    def tick(self) -> None:
        while not self.stopped.wait(SLICE_SECONDS):
            try:
                self.flush()
            except Exception as error:
                self.failure = error  # raised by the next add(), on the caller's thread
                return

    def admit(self, rows: int, tokens: int) -> None:
        self.store.admit(self.attempt, rows, tokens)

    def add(self, number: int, completion: Completion) -> None:
        if self.failure is not None:
            raise self.failure
        with self.lock:
            self.waiting.append((number, completion))
            full = len(self.waiting) >= SLICE_ROWS
        if full:
            self.flush()

    def flush(self) -> None:
        """Commit what waits: answers, ledger lines and reservation in one transaction."""
        with self.lock:
            if not self.waiting:
                return
            done, self.waiting = self.waiting, []
            stored = [s for n, c in done if (s := self.work.stored(n, c)) is not None]
            tokens = int(self.estimates[[n for n, _ in done]].sum())
            self.store.commit(self.attempt, stored, self.lines(done), len(done), tokens)
            for number, completion in done:
                self.work.found[number] = completion
            usage = total(c.usage for _, c in done)
            rows = int(self.copies[[n for n, _ in done]].sum())
            self.progress.advance(rows, usage, amount(self.prices, usage), self.prices.currency)

    def lines(self, done: list[tuple[int, Completion]]) -> list[LedgerLine]:
        computed = billed(self.prices, len(done), total(c.usage for _, c in done))
        again = [(c.usage, int(self.copies[n]) - 1) for n, c in done]
        spared = total(times(usage, copies) for usage, copies in again)
        return computed + free(self.prices, "duplicate", sum(c for _, c in again), spared)

    def reuse(self) -> None:
        """Ledger lines, at no cost, for what the store answered."""
        resumed, reused = self.work.resumed, self.work.reused - self.work.resumed
        lines = [line for kind, ns in (("resumed", resumed), ("reused", reused)) for line in self.free_line(kind, ns)]
        if lines:
            self.store.commit(self.attempt, [], lines, 0, 0)
        known = int(self.copies[sorted(self.work.reused)].sum()) if self.work.reused else 0
        if known:
            self.progress.advance(known, total(()), amount(self.prices, total(())), self.prices.currency)

    def free_line(self, kind: str, numbers: set[int]) -> list[LedgerLine]:
        usages = [(c.usage, int(self.copies[n])) for n in numbers if (c := self.work.found[n]) is not None]
        return free(self.prices, kind, sum(c for _, c in usages), total(times(u, c) for u, c in usages))
