"""Small requests that arrive close together become one run, so that the engine sees more than a few rows at a time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from complete_fn.engines.stoppable import Stopped
from complete_fn.errors import EngineBusyError
from complete_fn.execution.answers import committed_answers
from complete_fn.service.call_out import Detail, Share
from complete_fn.service.engine_host import EngineHost
from complete_fn.text import text_column
from complete_fn.types import Asker, Completion

WINDOW = 0.05  # seconds that a run waits for more requests; it waits longer while all lanes are taken
LANES = 16  # runs at the same time
WAITING, WAITING_ROWS = 512, 100_000  # requests and rows that may wait; half of each for one tenant
LATE = "The engine did not finish the row within the {0:.0f} s that the caller waits."

Key = tuple[str, str, str, Asker]


@dataclass(eq=False)
class Ticket:
    """Rows of one request that wait for their answers. The request may leave at any time."""

    share: Share
    who: Asker
    until: float
    done: Future[list[Detail]] = field(default_factory=Future)
    gone: threading.Event = field(default_factory=threading.Event)
    left: Callable[[], None] = lambda: None

    @property
    def key(self) -> Key:
        return self.share.model, self.share.options, self.share.cache, self.who

    def leave(self) -> None:
        """Note that nobody waits for these rows any more. A run stops when all its tickets have left."""
        self.gone.set()
        self.left()


class Merger:
    """Merges requests of the same tenant, user, query, model and options. Safe from several threads."""

    def __init__(self, engines: EngineHost, window: float = WINDOW, lanes: int = LANES) -> None:
        self.engines, self.window = engines, window
        self.lock = threading.Lock()
        self.lanes = threading.BoundedSemaphore(lanes)
        self.waiting: dict[Key, list[Ticket]] = {}
        self.runs = 0

    def submit(self, wanted: Sequence[tuple[Share, Asker]], seconds: float) -> list[Ticket]:
        """Queue the shares of a request; each is run together with others of the same key.

        Raises:
            EngineBusyError: Too many requests or rows wait already.
        """
        until = time.monotonic() + seconds
        tickets = [Ticket(share, who, until) for share, who in wanted]
        with self.lock:
            for tenant in {who.tenant for _, who in wanted}:
                self.refuse_crowd(tenant, sum(len(share.rows) for share, _ in wanted))
            begun = [t.key for t in tickets if t.key not in self.waiting]
            for ticket in tickets:
                self.waiting.setdefault(ticket.key, []).append(ticket)
        for key in begun:
            threading.Thread(target=self.gather, args=(key,), name="call-outs", daemon=True).start()
        return tickets

    def refuse_crowd(self, tenant: str, rows: int) -> None:
        everyone = [t for tickets in self.waiting.values() for t in tickets]
        mine = [t for t in everyone if t.who.tenant == tenant]
        for waiting, share in ((everyone, 1), (mine, 2)):
            count = sum(len(t.share.rows) for t in waiting)
            if len(waiting) >= WAITING // share or (waiting and count + rows > WAITING_ROWS // share):
                raise EngineBusyError(
                    f"{len(waiting):,} requests with {count:,} rows wait already. Try again later."
                ).for_everybody()

    def gather(self, key: Key) -> None:
        time.sleep(self.window)
        with self.lanes:
            with self.lock:
                tickets = [t for t in self.waiting.pop(key) if not t.gone.is_set()]
                self.runs += bool(tickets)
            if tickets:
                self.run(tickets)

    def run(self, tickets: list[Ticket]) -> None:
        """Answer the tickets in one run. If the run fails, each ticket gets its error."""
        stop = threading.Event()

        def left() -> None:
            if all(t.gone.is_set() for t in tickets):
                stop.set()

        for ticket in tickets:
            ticket.left = left
        left()
        prompts = [p for t in tickets for p in t.share.prompts]
        seconds = min(t.until for t in tickets) - time.monotonic()
        alarm = threading.Timer(max(seconds, 0), stop.set)
        alarm.daemon = True
        alarm.start()
        try:
            rows = self.answer(tickets, text_column(prompts), stop, seconds)
        except BaseException as error:
            for ticket in tickets:
                ticket.done.set_exception(error)
            return
        finally:
            alarm.cancel()
        for ticket in tickets:
            count = len(ticket.share.rows)
            ticket.done.set_result(rows[:count])
            rows = rows[count:]

    def answer(self, tickets: list[Ticket], prompts: Any, stop: threading.Event, seconds: float) -> list[Detail]:
        """Run the prompts; rows that are late get a row error.

        Raises:
            Stopped: All tickets have left.
        """
        who, share = tickets[0].who, tickets[0].share
        try:
            answers = self.engines.complete(share.call, prompts, who, stop, share.cache)
        except Stopped:
            if all(t.gone.is_set() for t in tickets):
                raise
            late = Completion.failed("timeout", LATE.format(seconds))
            answers = committed_answers(share.call, prompts, self.engines.state.store, who, share.cache, late)
        rows: list[Detail] = answers.details.to_pylist()
        return rows
