"""`PartRunner` runs a part's prompts through `run()`, commits the result under its claim, and handles failures."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from complete_fn.engines.call import Call
from complete_fn.engines.stoppable import Stopped
from complete_fn.engines.throughput import Watch
from complete_fn.errors import CompleteError, StorageError, StoreError
from complete_fn.execution.answers import Answers, committed_answers
from complete_fn.jobs.job import STORE_TRIES, Job, Part
from complete_fn.logs import for_tenant, log_failure
from complete_fn.prompts.options import parse_options
from complete_fn.service.engine_host import EngineHost
from complete_fn.service.job_files import CANCELLED, read_prompts, write_result
from complete_fn.spending.shared_budget import Cap, job_cap
from complete_fn.store.transactions import repeated
from complete_fn.types import Asker

T = TypeVar("T")
RETRY_SECONDS = 2.0  # pause before a failed part runs again; doubled with each try


@dataclass
class Hand:
    """A part that runs here.

    Attributes:
        salvage: the part is not run; the rows that it has already committed become its result.
        stop: set when the run must end.
        why: why it must end: "job" if the job stops, "lease" if the part's lease is lost.
    """

    part: Part
    watch: Watch
    salvage: bool = False
    stop: threading.Event = field(default_factory=threading.Event)
    why: str = ""


class PartRunner:
    """Runs parts of a service's jobs, several at a time on threads of its callers.

    Args:
        closing: set when the worker ends, so that stopped parts are given back.
    """

    def __init__(self, engines: EngineHost, closing: threading.Event) -> None:
        self.engines, self.state, self.closing = engines, engines.state, closing
        self.lock = threading.Lock()
        self.hands: dict[str | None, Hand] = {}

    def held(self) -> list[Hand]:
        with self.lock:
            return list(self.hands.values())

    def run(self, part: Part, fed: Callable[[], None], salvage: bool = False) -> None:
        hand = Hand(part, Watch(fed), salvage)
        with self.lock:
            self.hands[part.claim] = hand
        try:
            self.complete(hand)
        except CompleteError as error:
            whole = str(for_tenant(f"part {part.name}", error, part.tenant))
            told = whole.splitlines()[0]  # what follows is an engine's log
            delay = RETRY_SECONDS * 2**part.tries
            if error.retryable and hand.watch.answered:  # rows were answered, so the part itself is not the cause
                self.state.parts.give_back(part, delay=RETRY_SECONDS)
            elif isinstance(error, StoreError):
                self.state.parts.give_back(part, delay, told, STORE_TRIES, hand.salvage)
            elif error.retryable:
                self.state.parts.give_back(part, delay, told, salvage=hand.salvage)
            else:
                self.state.parts.fail(part, whole, hand.salvage)
        except Exception as error:
            log_failure(f"part {part.name}", error)
            told = f"The service failed: {type(error).__name__}."
            self.state.parts.give_back(part, RETRY_SECONDS, told, salvage=hand.salvage)
        finally:
            with self.lock:
                del self.hands[part.claim]

    def complete(self, hand: Hand) -> None:
        part, state = hand.part, self.state
        job = state.jobs.get(part.tenant, part.job)
        table = self.while_away(hand, lambda: read_prompts(state, part))
        options = parse_options(json.loads(part.options))
        call = Call.of(state.model(part.model), options)
        who = Asker(part.tenant, job.user, part.name, job.query_tag, (part.id, part.claim or ""))
        try:
            if hand.salvage:
                raise Stopped
            answers = self.engines.complete(
                call, table.column("prompt"), who, hand.stop, options.cache, cap_of(job), watch=hand.watch
            )
        except Stopped:
            if hand.salvage or hand.why == "job":
                prompts = table.column("prompt")
                committed = committed_answers(call, prompts, state.store, who, options.cache, CANCELLED)
                self.commit(hand, table, committed, "cancelled")
            elif self.closing.is_set():
                self.state.parts.give_back(part)
            return
        self.commit(hand, table, answers, "done")

    def while_away(self, hand: Hand, step: Callable[[], T]) -> T:
        """Do a step again while the storage is away: rows were paid for, and a disk may be full for minutes.

        Raises:
            StorageError: The storage is away for too long, or the part must stop. It is given back, and run again.
        """
        if hand.salvage:  # the thread that salvages has other work
            return step()
        return repeated(step, StorageError, lambda seconds: not hand.stop.wait(seconds))

    def commit(self, hand: Hand, table: Any, answers: Answers, status: str) -> None:
        """Write the answers to this claim's own file, then name the file in the store. A lost lease leaves no trace."""
        state, part, rows = self.state, hand.part, table.column("row")
        name, failed, size = self.while_away(hand, lambda: write_result(state, part, rows, answers))
        if state.parts.finish(part, status, name, failed, size):
            state.store.end_job(part.tenant, part.name)
        else:
            state.storage.delete(state.job_key(part.job, name))


def cap_of(job: Job) -> Cap | None:
    """The job's `max_cost`, which its parts share on all machines."""
    return None if job.max_cost_nano is None else job_cap(job.id, job.max_cost_nano)
