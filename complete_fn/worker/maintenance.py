"""An API process whose workers are other processes does the maintenance: it announces work, scales and cleans."""

from __future__ import annotations

import threading

from complete_fn.jobs.job import LEASE_SECONDS
from complete_fn.service.engine_host import EngineHost
from complete_fn.worker.fleet import Fleet
from complete_fn.worker.part_runner import PartRunner
from complete_fn.worker.periodic import PeriodicTask, run_due_tasks
from complete_fn.worker.upkeep import Upkeep

LOOK_SECONDS, ANNOUNCE_SECONDS, FORGET_SECONDS = 1.0, 3.0, 5.0


class Maintenance:
    """Announces work again, as a broker may lose messages, scales the fleet, fills sinks, and cleans as a worker does.

    Args:
        fleet: the worker processes that this process starts and stops; None if it starts none.
    """

    def __init__(self, engines: EngineHost, fleet: Fleet | None = None) -> None:
        self.state, self.fleet = engines.state, fleet
        self.closing = threading.Event()
        self.upkeep = Upkeep(engines, PartRunner(engines, self.closing), 0, "maintenance", self.drain)
        self.threads = [
            threading.Thread(target=self.go, name="maintenance", daemon=True),
            *self.upkeep.threads,
        ]

    def start(self) -> None:
        for thread in self.threads:
            thread.start()

    def alive(self) -> bool:
        return all(thread.is_alive() for thread in self.threads)

    def drain(self) -> None:
        """Nothing to do: the workers look at the store's version themselves."""

    def close(self) -> None:
        """Stop the maintenance. The workers that this process started drain and end."""
        self.closing.set()
        for thread in self.threads:
            thread.join(LEASE_SECONDS)
        if self.fleet is not None:
            self.fleet.close()

    def go(self) -> None:
        tasks = [
            PeriodicTask(ANNOUNCE_SECONDS, self.announce),
            PeriodicTask(FORGET_SECONDS, self.state.workers.forget_gone),
        ]
        if self.fleet is not None:
            tasks.append(PeriodicTask(LOOK_SECONDS, self.fleet.adjust))
        while not self.closing.wait(LOOK_SECONDS):
            if not self.state.store.is_outdated:
                run_due_tasks(tasks)

    def announce(self) -> None:
        load = self.state.workers.load()
        self.state.queue.announce({model: work.queued_parts for model, work in load.items()})
