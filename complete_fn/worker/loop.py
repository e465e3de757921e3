"""The worker: threads that claim parts and run them, and one that renews their leases."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from complete_fn.jobs.job import LEASE_SECONDS, Part
from complete_fn.jobs.job_store import worker_name
from complete_fn.jobs.worker_store import BEAT_SECONDS
from complete_fn.logs import log
from complete_fn.service.service import Service
from complete_fn.worker.part_runner import Hand, PartRunner
from complete_fn.worker.periodic import PeriodicTask, run_due_tasks
from complete_fn.worker.upkeep import Upkeep

AT_ONCE = 2  # parts being fed into the engine
TAILS = 2  # more parts whose last rows are being answered, so that the engine does not fall dry between two
LOOK_SECONDS, RENEW_SECONDS = 0.5, LEASE_SECONDS / 3
IDLE_SECONDS, STOP_SECONDS = 2.0, 0.05


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
        self.feeding = threading.BoundedSemaphore(at_once)
        self.draining, self.closing = threading.Event(), threading.Event()
        self.runner = PartRunner(service, self.closing)
        self.upkeep = Upkeep(service, self.runner, at_once + TAILS, "worker")
        self.threads = [
            threading.Thread(target=self.run_parts, args=(n,), name=f"worker-{n}", daemon=True)
            for n in range(at_once + TAILS)
        ]
        self.keeper = threading.Thread(target=self.keep_leases, name="worker-keeper", daemon=True)
        self.threads += self.upkeep.threads

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
        return self.runner.held()

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
                    self.runner.run(part, fed)
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

    # -- leases --------------------------------------------------------------------------------------------------

    def keep_leases(self) -> None:
        """Stop what is to stop, renew leases, tell of ourselves. Nothing else: others wait for none of it long."""
        tasks = [
            PeriodicTask(LOOK_SECONDS, self.look),
            PeriodicTask(RENEW_SECONDS, lambda: self.jobs.renew([hand.part for hand in self.held()])),
        ]
        if self.tell is not None:
            tell = self.tell
            tasks.append(PeriodicTask(BEAT_SECONDS, lambda: tell(len(self.held()))))
        while not self.closing.wait(LOOK_SECONDS):
            run_due_tasks(tasks)
        while self.held():  # parts that are being given back keep their lease meanwhile
            run_due_tasks(tasks)
            time.sleep(STOP_SECONDS)

    def look(self) -> None:
        held = self.held()  # once: a part that is claimed meanwhile is not lost
        newest = {hand.part.id: hand for hand in sorted(held, key=lambda hand: hand.part.fence)}
        why = self.jobs.lost([hand.part for hand in newest.values()])
        for hand in held:
            lost = why.get(hand.part.id, "") if newest.get(hand.part.id) is hand else "lease"
            if lost and not hand.stop.is_set():
                hand.why = lost
                hand.stop.set()


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
