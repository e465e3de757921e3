"""The worker: threads that claim parts, run them through `runner.run`, and commit their results under a fence."""

from __future__ import annotations

import json
import logging
import threading
import time
import traceback
from dataclasses import dataclass, field
from typing import Any

from pyarrow import parquet

from complete_fn.answers import Answers
from complete_fn.budget import Budget
from complete_fn.errors import CompleteError, StoreError
from complete_fn.job_results import write_part
from complete_fn.job_store import worker_name
from complete_fn.jobs import LEASE_SECONDS, Job, Part
from complete_fn.keys import Call
from complete_fn.ledger import money
from complete_fn.options import Options, parse_options
from complete_fn.plan import make_plan
from complete_fn.service import Service
from complete_fn.stoppable import Stopped
from complete_fn.submit import part_file
from complete_fn.summary import summarise
from complete_fn.types import Asker, Completion
from complete_fn.work import known_answers

LOG = logging.getLogger("complete_fn.worker")
AT_ONCE = 2  # parts in flight into one engine, so that it does not fall dry between two
LOOK_SECONDS, RENEW_SECONDS, UPKEEP_SECONDS = 0.5, LEASE_SECONDS / 3, 5.0
IDLE_SECONDS = 2.0
RETRY_SECONDS = 2.0
CANCELLED = "The job was stopped before the row was done."


@dataclass
class Hand:
    """A part that is being run here."""

    part: Part
    stop: threading.Event = field(default_factory=threading.Event)
    why: str = ""


class WorkerLoop:
    """Workers of one process on one service. `close` gives the parts in hand back."""

    def __init__(self, service: Service, at_once: int = AT_ONCE) -> None:
        self.service, self.jobs = service, service.jobs
        self.lock = threading.Lock()
        self.hands: dict[int, Hand] = {}
        self.budgets: dict[str, Budget] = {}
        self.closing = threading.Event()
        self.threads = [
            threading.Thread(target=self.run_parts, args=(n,), name=f"worker-{n}", daemon=True) for n in range(at_once)
        ]
        self.threads.append(threading.Thread(target=self.keep, name="worker-keeper", daemon=True))

    def start(self) -> None:
        for thread in self.threads:
            thread.start()

    def alive(self) -> bool:
        return all(thread.is_alive() for thread in self.threads)

    def close(self) -> None:
        self.closing.set()
        for hand in self.held():
            hand.stop.set()
        self.service.queue.notify()
        for thread in self.threads:
            thread.join(LEASE_SECONDS)

    def held(self) -> list[Hand]:
        with self.lock:
            return list(self.hands.values())

    # -- parts ---------------------------------------------------------------------------------------------------

    def run_parts(self, number: int) -> None:
        worker = worker_name(number)
        while not self.closing.is_set():
            try:
                part = self.jobs.claim(worker)
                if part is None:
                    self.service.queue.wait(IDLE_SECONDS)
                else:
                    self.run_part(part)
            except Exception as error:
                log("claiming a part", error)
                self.closing.wait(IDLE_SECONDS)

    def run_part(self, part: Part) -> None:
        hand = Hand(part)
        with self.lock:
            self.hands[part.id] = hand
        try:
            self.complete(hand)
        except CompleteError as error:
            if error.retryable or isinstance(error, StoreError):
                self.jobs.give_back(part, delay=RETRY_SECONDS * 2**part.tries, error=str(error).splitlines()[0])
            else:
                self.jobs.fail(part, str(error))
        except Exception as error:
            log(f"part {part.name}", error)
            self.jobs.give_back(part, delay=RETRY_SECONDS, error=f"The service failed: {type(error).__name__}.")
        finally:
            with self.lock:
                del self.hands[part.id]

    def complete(self, hand: Hand) -> None:
        part, service = hand.part, self.service
        job = self.jobs.get(part.tenant, part.job)
        table = parquet.read_table(service.job_folder(job.id) / part_file(part.number))
        options = parse_options(json.loads(part.options))
        call = Call(service.model(part.model), options.sampling, options.response_format)
        who = Asker(part.tenant, job.user, part.name, job.query_tag)
        try:
            answers = service.complete(call, table.column("prompt"), who, hand.stop, options.cache, self.budget(job))
        except Stopped:
            if self.closing.is_set():
                self.jobs.give_back(part)
            elif hand.why == "job":
                self.commit(
                    part, table, stopped_answers(service, call, table.column("prompt"), who, options), "cancelled"
                )
            return
        self.commit(part, table, answers, "done")

    def commit(self, part: Part, table: Any, answers: Answers, status: str) -> None:
        """The answers are in a file of this claim alone before the store names it; a lost lease leaves no trace."""
        folder = self.service.job_folder(part.job)
        name = f"result-{part.number:05}-{part.fence}.parquet"
        failed = write_part(folder / name, table.column("row"), answers)
        if self.jobs.finish(part, status, name, failed):
            self.service.store.end_job(part.tenant, part.name)
        else:
            (folder / name).unlink(missing_ok=True)

    def budget(self, job: Job) -> Budget | None:
        """What is left of the job's `max_cost`, shared by its parts."""
        if job.max_cost_nano is None:
            return None
        with self.lock:
            if job.id not in self.budgets:
                spent = money(self.jobs.counts(job).cost_nano)
                self.budgets[job.id] = Budget(money(job.max_cost_nano), spent)
            return self.budgets[job.id]

    # -- upkeep --------------------------------------------------------------------------------------------------

    def keep(self) -> None:
        """Stop what is to stop, renew leases, sweep those of others."""
        renewed = swept = 0.0
        while not self.closing.wait(LOOK_SECONDS):
            now = time.monotonic()
            try:
                self.look()
                if now - renewed > RENEW_SECONDS:
                    self.jobs.renew([hand.part for hand in self.held()])
                    renewed = now
                if now - swept > UPKEEP_SECONDS:
                    self.upkeep()
                    swept = now
            except Exception as error:
                log("upkeep", error)

    def look(self) -> None:
        held = self.held()
        why = self.jobs.lost([hand.part for hand in held])
        for hand in held:
            if hand.part.id in why:
                hand.why = why[hand.part.id]
                hand.stop.set()

    def upkeep(self) -> None:
        self.jobs.expire()
        if self.jobs.sweep():
            self.service.queue.notify()
        self.service.upkeep()
        with self.lock:
            if not self.hands:
                self.budgets.clear()


def stopped_answers(service: Service, call: Call, prompts: Any, who: Asker, options: Options) -> Answers:
    """What a stopped run had committed; the other rows are `cancelled`."""
    plan = make_plan(prompts, mergeable=call.sampling.greedy)
    work = known_answers(call, plan, service.store, who, options.cache)
    for number in work.missing():
        work.found[number] = Completion.failed("cancelled", CANCELLED)
    return Answers(plan, work.completions, call.model.prices, summarise(call, work, 0.0))


def log(what: str, error: Exception) -> None:
    """The type and place of an error; its message may quote a prompt."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    LOG.error("%s: %s at %s:%s", what, type(error).__name__, last.name, last.lineno)
