"""What every process of a service does beside its own work: end what was stopped, sweep, deliver."""

from __future__ import annotations

import threading

from complete_fn.jobs.job_store import worker_name
from complete_fn.service.delivery import keep_delivering
from complete_fn.service.retention import expire
from complete_fn.service.service import Service
from complete_fn.worker.part_runner import PartRunner
from complete_fn.worker.periodic import PeriodicTask, run_due_tasks

LOOK_SECONDS, STOPPED_SECONDS, UPKEEP_SECONDS = 0.5, 1.0, 5.0


class Upkeep:
    """Two threads until `closing` is set: one cleans, which a slow storage may make long, one delivers results.

    Args:
        runner: makes results of the parts of stopped jobs, from what they have committed.
        number: of the worker in whose name it claims those parts.
        name: of its threads.
    """

    def __init__(self, service: Service, runner: PartRunner, number: int, name: str) -> None:
        self.service, self.runner, self.number = service, runner, number
        self.closing = runner.closing
        given = (service, self.closing)
        self.threads = [
            threading.Thread(target=keep_delivering, args=given, name=f"{name}-writer", daemon=True),
            threading.Thread(target=self.clean, name=f"{name}-cleaner", daemon=True),
        ]

    def clean(self) -> None:
        tasks = [PeriodicTask(STOPPED_SECONDS, self.end_stopped), PeriodicTask(UPKEEP_SECONDS, self.sweep)]
        while not self.closing.wait(LOOK_SECONDS):
            run_due_tasks(tasks)

    def end_stopped(self) -> None:
        """Parts that wait, of jobs that are to stop: their committed rows are their results.

        They are found by the checkpoint's identity, so what is not on this machine is left to the workers.
        """
        absent = [name for name, model in self.service.models().items() if model.is_absent]
        if absent and not self.service.workers.alive():
            absent = []
        jobs = self.service.jobs
        while (part := jobs.claim_stopped(worker_name(self.number), not_of=absent)) is not None:
            self.runner.run(part, lambda: None, salvage=True)

    def sweep(self) -> None:
        """Free what the dead hold, and let go what is over."""
        self.service.store.sweep()  # what the dead have reserved of a budget others may be waiting for
        self.service.jobs.expire()
        expire(self.service)
        if self.service.jobs.sweep():
            self.service.queue.bell.ring()
        self.service.upkeep()
