"""A worker has threads that claim parts and run them, and one thread that renews their leases."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from complete_fn.jobs.job import LEASE_SECONDS, Part
from complete_fn.jobs.part_queue import worker_name
from complete_fn.jobs.worker_store import BEAT_SECONDS
from complete_fn.logs import log_failure
from complete_fn.service.engine_host import EngineHost
from complete_fn.worker.part_runner import Hand, PartRunner
from complete_fn.worker.periodic import PeriodicTask, run_due_tasks
from complete_fn.worker.upkeep import Upkeep

AT_ONCE = 2  # parts whose prompts are being fed into the engine
TAILS = 2  # more parts whose last rows are being answered, so that the engine does not run dry between two parts
LOOK_SECONDS, RENEW_SECONDS = 0.5, LEASE_SECONDS / 3
IDLE_SECONDS, STOP_SECONDS = 2.0, 0.05


class WorkerLoop:
    """The workers of one process for one service. `close` gives back the parts that they run.

    Args:
        at_once: parts that are fed at the same time. The next part is claimed as soon as the engine has drawn all of
            a part's prompts, while its last rows are still being answered.
        poll_seconds: how often idle threads look for work without being notified.
        tell: called every 2 s with the number of parts that run here, for the heartbeat.
    """

    def __init__(
        self,
        engines: EngineHost,
        at_once: int = AT_ONCE,
        poll_seconds: float = IDLE_SECONDS,
        tell: Callable[[int], None] | None = None,
    ) -> None:
        self.engines, self.state, self.parts = engines, engines.state, engines.state.parts
        self.poll_seconds, self.tell = poll_seconds, tell
        self.feeding = threading.BoundedSemaphore(at_once)
        self.draining, self.closing = threading.Event(), threading.Event()
        self.runner = PartRunner(engines, self.closing)
        self.upkeep = Upkeep(engines, self.runner, at_once + TAILS, "worker", self.drain)
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
        """Claim no more parts. Parts that run go on."""
        self.draining.set()
        self.state.queue.bell.close()

    def close(self) -> None:
        """Give back the parts that run; their committed rows are kept."""
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
        worker, bell = worker_name(number), self.state.queue.bell
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
                log_failure("claiming a part", error)
                self.closing.wait(IDLE_SECONDS)
            finally:
                fed()

    def claim(self, worker: str) -> Part | None:
        """The next part of the models that `next_models` allows here, in its order; None if there is none."""
        for model in self.engines.room.next_models(self.deserted):
            part = self.parts.claim(worker, model=model)
            if part is not None:
                return part
        return None

    def deserted(self) -> bool:
        """Whether a model has queued parts and no worker has its engine warm."""
        beats = self.state.workers.alive()
        loads = self.state.workers.load().items()
        return any(load.queued_parts and not any(b.warm(model) for b in beats) for model, load in loads)

    # -- leases --------------------------------------------------------------------------------------------------

    def keep_leases(self) -> None:
        """Stop lost parts, renew leases, send heartbeats. Nothing slow runs on this thread: leases must not lapse."""
        tasks = [
            PeriodicTask(LOOK_SECONDS, self.look),
            PeriodicTask(RENEW_SECONDS, lambda: self.parts.renew([hand.part for hand in self.held()])),
        ]
        if self.tell is not None:
            tell = self.tell
            tasks.append(PeriodicTask(BEAT_SECONDS, lambda: tell(len(self.held()))))
        while not self.closing.wait(LOOK_SECONDS):
            run_due_tasks(tasks)
        while self.held():  # a part keeps its lease until it is given back
            run_due_tasks(tasks)
            time.sleep(STOP_SECONDS)

    def look(self) -> None:
        held = self.held()  # read once: a part claimed after this line must not look lost
        newest = {hand.part.id: hand for hand in held}  # in the order of their claims
        why = self.parts.lost([hand.part for hand in newest.values()])
        for hand in held:
            lost = why.get(hand.part.id, "") if newest.get(hand.part.id) is hand else "lease"
            if lost and not hand.stop.is_set():
                hand.why = lost
                hand.stop.set()


class Once:
    """Calls `what` at the first call only."""

    def __init__(self, what: Callable[[], None]) -> None:
        self.what, self.lock, self.called = what, threading.Lock(), False

    def __call__(self) -> None:
        with self.lock:
            if self.called:
                return
            self.called = True
        self.what()
