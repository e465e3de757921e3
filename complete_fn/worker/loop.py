"""The worker: threads that claim parts, run them through `runner.run`, and commit their results under a fence."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pyarrow import parquet

from complete_fn.engines.call import Call
from complete_fn.engines.stoppable import Stopped
from complete_fn.engines.throughput import Watch
from complete_fn.engines.tokenizer import token_sizes
from complete_fn.errors import CompleteError, StoreError
from complete_fn.execution.answers import Answers
from complete_fn.execution.run_state import known_answers
from complete_fn.execution.summary import summarise
from complete_fn.jobs.job import LEASE_SECONDS, STORE_TRIES, Job, Part
from complete_fn.jobs.job_store import worker_name
from complete_fn.jobs.worker_store import BEAT_SECONDS
from complete_fn.logs import log
from complete_fn.planning import make_plan
from complete_fn.prompts.options import Options, parse_options
from complete_fn.service.delivery import keep_delivering
from complete_fn.service.job_files import part_file, write_part
from complete_fn.service.retention import expire
from complete_fn.service.service import Service
from complete_fn.spending.shared_budget import Cap, job_cap
from complete_fn.types import Asker, Completion
from complete_fn.worker.periodic import PeriodicTask, run_due_tasks

AT_ONCE = 2  # parts being fed into the engine
TAILS = 2  # more parts whose last rows are being answered, so that the engine does not fall dry between two
LOOK_SECONDS, RENEW_SECONDS, UPKEEP_SECONDS = 0.5, LEASE_SECONDS / 3, 5.0
IDLE_SECONDS, STOPPED_SECONDS, STOP_SECONDS = 2.0, 1.0, 0.05
RETRY_SECONDS = 2.0
CANCELLED = "The job was stopped before the row was done."


@dataclass
class Hand:
    """A part that is being run here. `salvage`: only what it has committed is to be its result."""

    part: Part
    watch: Watch
    salvage: bool = False
    stop: threading.Event = field(default_factory=threading.Event)
    why: str = ""


class WorkerLoop:
    """Workers of one process on one service. `close` gives the parts in hand back.

    Args:
        at_once: parts that are fed at the same time. The next one is claimed as soon as one of them is all handed
            over, while its last rows are still being answered.
        poll_seconds: idle hands look for work so often without being told.
        tell: called every 2 s with the state of this process, for its heartbeat.
    """

    def __init__(
        self,
        service: Service,
        at_once: int = AT_ONCE,
        poll_seconds: float = IDLE_SECONDS,
        tell: Callable[[int], None] | None = None,
    ) -> None:
        self.service, self.jobs = service, service.jobs
        self.poll_seconds, self.tell = poll_seconds, tell
        self.lock = threading.Lock()
        self.hands: dict[tuple[int, int], Hand] = {}
        self.feeding = threading.BoundedSemaphore(at_once)
        self.draining, self.closing = threading.Event(), threading.Event()
        self.threads = [
            threading.Thread(target=self.run_parts, args=(n,), name=f"worker-{n}", daemon=True)
            for n in range(at_once + TAILS)
        ]
        self.keeper = threading.Thread(target=self.keep, name="worker-keeper", daemon=True)
        given = (service, self.closing)
        self.threads += [
            threading.Thread(target=keep_delivering, args=given, name="worker-writer", daemon=True),
            threading.Thread(target=self.clean, name="worker-cleaner", daemon=True),
        ]

    def start(self) -> None:
        for thread in [*self.threads, self.keeper]:
            thread.start()

    def alive(self) -> bool:
        return all(thread.is_alive() for thread in [*self.threads, self.keeper])

    def drain(self) -> None:
        """Claim nothing more; what is in hand goes on."""
        self.draining.set()
        self.service.queue.bell.close()

    def close(self) -> None:
        """Give back what is in hand, its committed rows kept."""
        self.drain()
        self.closing.set()
        for hand in self.held():
            hand.stop.set()
        for thread in [*self.threads, self.keeper]:
            thread.join(LEASE_SECONDS)

    def held(self) -> list[Hand]:
        with self.lock:
            return list(self.hands.values())

    # -- parts ---------------------------------------------------------------------------------------------------

    def run_parts(self, number: int) -> None:
        worker, bell = worker_name(number), self.service.queue.bell
        while not self.draining.is_set():
            fed = Once(self.feeding.release)
            self.feeding.acquire()
            try:
                heard = bell.look()
                part = None if self.draining.is_set() else self.claim(worker)
                if part is None:
                    fed()
                    bell.wait(heard, self.poll_seconds)
                else:
                    self.run_part(part, fed)
            except Exception as error:
                log("claiming a part", error)
                self.closing.wait(IDLE_SECONDS)
            finally:
                fed()

    def claim(self, worker: str) -> Part | None:
        """The next part, of the models whose turn it is here."""
        for model in self.service.room.next_models(self.deserted):
            part = self.jobs.claim(worker, model=model)
            if part is not None:
                return part
        return None

    def deserted(self) -> bool:
        """Whether parts wait of a model that no worker is warm for."""
        beats = self.service.workers.alive()
        loads = self.service.workers.load().items()
        return any(load.queued_parts and not any(b.warm(model) for b in beats) for model, load in loads)

    def end_stopped(self) -> None:
        """Parts that wait, of jobs that are to stop: their committed rows are their results.

        They are found by the checkpoint's identity, so what is not on this machine is left to the workers.
        """
        absent = [name for name, model in self.service.models().items() if model.is_absent]
        if absent and not self.service.workers.alive():
            absent = []
        while (part := self.jobs.claim_stopped(worker_name(len(self.threads)), not_of=absent)) is not None:
            self.run_part(part, lambda: None, salvage=True)

    def run_part(self, part: Part, fed: Callable[[], None], salvage: bool = False) -> None:
        hand = Hand(part, Watch(fed), salvage)
        with self.lock:
            self.hands[part.id, part.fence] = hand
        try:
            self.complete(hand)
        except CompleteError as error:
            told, delay = str(error).splitlines()[0], RETRY_SECONDS * 2**part.tries
            if error.retryable and hand.watch.answered:  # it got on, so it is no fault of the part
                self.jobs.give_back(part, delay=RETRY_SECONDS)
            elif isinstance(error, StoreError):
                self.jobs.give_back(part, delay, told, STORE_TRIES, hand.salvage)
            elif error.retryable:
                self.jobs.give_back(part, delay, told, salvage=hand.salvage)
            else:
                self.jobs.fail(part, str(error), hand.salvage)
        except Exception as error:
            log(f"part {part.name}", error)
            told = f"The service failed: {type(error).__name__}."
            self.jobs.give_back(part, RETRY_SECONDS, told, salvage=hand.salvage)
        finally:
            with self.lock:
                del self.hands[part.id, part.fence]

    def complete(self, hand: Hand) -> None:
        part, service = hand.part, self.service
        job = self.jobs.get(part.tenant, part.job)
        with service.storage.reading(service.job_key(job.id, part_file(part.number))) as source:
            table = parquet.read_table(source)
        options = parse_options(json.loads(part.options))
        call = Call.of(service.model(part.model), options)
        who = Asker(part.tenant, job.user, part.name, job.query_tag, (part.id, part.fence))
        try:
            if hand.salvage:
                raise Stopped
            answers = service.complete(
                call, table.column("prompt"), who, hand.stop, options.cache, cap_of(job), watch=hand.watch
            )
        except Stopped:
            if hand.salvage or hand.why == "job":
                rest = stopped_answers(service, call, table.column("prompt"), who, options)
                self.commit(part, table, rest, "cancelled")
            elif self.closing.is_set():
                self.jobs.give_back(part)
            return
        self.commit(part, table, answers, "done")

    def commit(self, part: Part, table: Any, answers: Answers, status: str) -> None:
        """The answers are in a file of this claim alone before the store names it; a lost lease leaves no trace."""
        service, name = self.service, f"result-{part.number:05}-{part.fence}.parquet"
        failed = write_part(service, service.job_key(part.job, name), table.column("row"), answers)
        if self.jobs.finish(part, status, name, failed):
            service.store.end_job(part.tenant, part.name)
        else:
            service.storage.delete(service.job_key(part.job, name))

    # -- upkeep --------------------------------------------------------------------------------------------------

    def keep(self) -> None:
        """Stop what is to stop, renew leases, tell of ourselves. Nothing else: others wait for none of it long."""
        turns = [
            PeriodicTask(LOOK_SECONDS, self.look),
            PeriodicTask(RENEW_SECONDS, lambda: self.jobs.renew([hand.part for hand in self.held()])),
        ]
        if self.tell is not None:
            tell = self.tell
            turns.append(PeriodicTask(BEAT_SECONDS, lambda: tell(len(self.held()))))
        while not self.closing.wait(LOOK_SECONDS):
            run_due_tasks(turns)
        while self.held():  # parts that are being given back keep their lease meanwhile
            run_due_tasks(turns)
            time.sleep(STOP_SECONDS)

    def clean(self) -> None:
        """Sweep what others left, and keep within bounds what is kept; a slow storage may make that long."""
        turns = [PeriodicTask(STOPPED_SECONDS, self.end_stopped), PeriodicTask(UPKEEP_SECONDS, self.upkeep)]
        while not self.closing.wait(LOOK_SECONDS):
            run_due_tasks(turns)

    def look(self) -> None:
        held = self.held()  # once: a part that is claimed meanwhile is not lost
        newest = {hand.part.id: hand for hand in sorted(held, key=lambda hand: hand.part.fence)}
        why = self.jobs.lost([hand.part for hand in newest.values()])
        for hand in held:
            lost = why.get(hand.part.id, "") if newest.get(hand.part.id) is hand else "lease"
            if lost and not hand.stop.is_set():
                hand.why = lost
                hand.stop.set()

    def upkeep(self) -> None:
        self.service.store.sweep()  # what the dead have reserved of a budget others may be waiting for
        self.jobs.expire()
        expire(self.service)
        if self.jobs.sweep():
            self.service.queue.bell.ring()
        self.service.upkeep()


def cap_of(job: Job) -> Cap | None:
    """The job's `max_cost`, shared by its parts wherever they run."""
    return None if job.max_cost_nano is None else job_cap(job.id, job.max_cost_nano)


class Once:
    """Calls `what` the first time only."""

    def __init__(self, what: Callable[[], None]) -> None:
        self.what, self.lock, self.called = what, threading.Lock(), False

    def __call__(self) -> None:
        with self.lock:
            if self.called:
                return
            self.called = True
        self.what()


def stopped_answers(service: Service, call: Call, prompts: Any, who: Asker, options: Options) -> Answers:
    """What a stopped run had committed; the other rows are `cancelled`."""
    plan = make_plan(prompts, mergeable=call.sampling.greedy, sizes=token_sizes(call.model))
    work = known_answers(call, plan, service.store, who, options.cache)
    for number in work.missing():
        work.found[number] = Completion.failed("cancelled", CANCELLED)
    return Answers(plan, work.completions, call.model.prices, summarise(call, work, 0.0))
