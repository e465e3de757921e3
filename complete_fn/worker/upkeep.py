"""Every process of a service does upkeep beside its own work: it ends stopped jobs, sweeps and delivers results."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress

from complete_fn.errors import StoreUpgradedError
from complete_fn.jobs.part_queue import worker_name
from complete_fn.jobs.worker_store import BEAT_SECONDS
from complete_fn.ledger.pruning import prune, prune_ledger
from complete_fn.logs import logger
from complete_fn.service.delivery import keep_delivering
from complete_fn.service.engine_host import EngineHost
from complete_fn.service.retention import expire
from complete_fn.worker.part_runner import PartRunner
from complete_fn.worker.periodic import PeriodicTask, run_due_tasks

LOG = logger("worker")
LOOK_SECONDS, STOPPED_SECONDS, UPKEEP_SECONDS = 0.5, 1.0, 5.0


class Upkeep:
    """Two threads run until `closing` is set: one cleans, which may be slow with a slow storage; one delivers results.

    Args:
        runner: makes the results of stopped jobs' parts, from the rows that they have committed.
        number: the number of the worker in whose name those parts are claimed.
        name: the beginning of the threads' names.
        drain: called once a newer version has upgraded the store. From then on the upkeep changes nothing any more.
    """

    def __init__(
        self, engines: EngineHost, runner: PartRunner, number: int, name: str, drain: Callable[[], None]
    ) -> None:
        self.engines, self.state, self.runner, self.number = engines, engines.state, runner, number
        self.closing, self.drain = runner.closing, drain
        given = (self.state, self.closing)
        self.threads = [
            threading.Thread(target=keep_delivering, args=given, name=f"{name}-writer", daemon=True),
            threading.Thread(target=self.clean, name=f"{name}-cleaner", daemon=True),
        ]

    def clean(self) -> None:
        tasks = [
            PeriodicTask(BEAT_SECONDS, self.look_at_version),
            PeriodicTask(STOPPED_SECONDS, self.end_stopped),
            PeriodicTask(UPKEEP_SECONDS, self.sweep),
        ]
        while not self.closing.wait(LOOK_SECONDS) and not self.state.store.is_outdated:
            run_due_tasks(tasks)
        if self.state.store.is_outdated:
            LOG.error(str(StoreUpgradedError()))
            self.drain()
            self.closing.wait()

    def look_at_version(self) -> None:
        with suppress(StoreUpgradedError):
            self.state.store.refuse_upgraded()

    def end_stopped(self) -> None:
        """Salvage the waiting parts of jobs that stop: their committed rows become their results.

        Committed rows are found by the checkpoint's identity. Parts of a model whose folder is not on this machine are
        left to the workers, unless no worker is alive.
        """
        absent = [name for name, model in self.state.models().items() if model.is_absent]
        if absent and not self.state.workers.alive():
            absent = []
        parts = self.state.parts
        while (part := parts.claim_stopped(worker_name(self.number), not_of=absent)) is not None:
            self.runner.run(part, lambda: None, salvage=True)

    def sweep(self) -> None:
        """Free what dead attempts and workers hold, delete what has expired, and let idle engines go."""
        state = self.state
        state.store.sweep()  # other runs may be waiting for money that a dead attempt has reserved
        state.jobs.expire()
        expire(state)
        if state.parts.sweep():
            state.queue.bell.ring()
        prune(state.store, state.settings.cache_gib, state.settings.cache_days)
        if state.settings.ledger_days is not None:
            prune_ledger(state.store, state.settings.ledger_days, state.store.now())
        self.engines.upkeep()
