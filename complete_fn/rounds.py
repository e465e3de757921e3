"""What an API process does beside answering when its workers are processes of their own: it computes nothing."""

from __future__ import annotations

import threading

from complete_fn.deliveries import keep_delivering
from complete_fn.fleet import Fleet
from complete_fn.service import Service
from complete_fn.turns import Turn, take_turns
from complete_fn.worker_loop import STOPPED_SECONDS, WorkerLoop

LOOK_SECONDS, ANNOUNCE_SECONDS, SWEEP_SECONDS = 1.0, 3.0, 5.0


class Rounds:
    """Announces work again (a broker may lose messages), sweeps what dead workers held, scales, and fills sinks.

    Args:
        fleet: worker processes to start and stop; None where others do.
    """

    def __init__(self, service: Service, fleet: Fleet | None = None) -> None:
        self.service, self.fleet = service, fleet
        self.loop = WorkerLoop(service)  # never started: only for what takes no engine
        self.closing = threading.Event()
        self.thread = threading.Thread(target=self.go, name="rounds", daemon=True)
        given = (service, self.closing)
        self.writer = threading.Thread(target=keep_delivering, args=given, name="rounds-writer", daemon=True)

    def start(self) -> None:
        self.thread.start()
        self.writer.start()

    def alive(self) -> bool:
        return self.thread.is_alive() and self.writer.is_alive()

    def close(self) -> None:
        """The workers that were started here drain, and go."""
        self.closing.set()
        self.thread.join()
        self.writer.join()
        if self.fleet is not None:
            self.fleet.close()

    def go(self) -> None:
        turns = [
            Turn(STOPPED_SECONDS, self.loop.end_stopped),
            Turn(ANNOUNCE_SECONDS, self.announce),
            Turn(SWEEP_SECONDS, self.sweep),
        ]
        if self.fleet is not None:
            turns.append(Turn(LOOK_SECONDS, self.fleet.adjust))
        while not self.closing.wait(LOOK_SECONDS):
            take_turns(turns)

    def announce(self) -> None:
        load = self.service.workers.load()
        self.service.queue.announce({model: work.queued_parts for model, work in load.items()})

    def sweep(self) -> None:
        self.service.workers.forget_gone()
        self.service.store.sweep()
        self.service.jobs.expire()
        if self.service.jobs.sweep():
            self.announce()
        self.service.upkeep()
