"""What API routes and worker threads share: one store, the catalogue, engines, budgets. Knows no HTTP."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from complete_fn.engines.base import Engine
from complete_fn.engines.call import Call
from complete_fn.engines.catalogue import Model, load_catalogue
from complete_fn.engines.pool import at_engine, engine_for, let_go
from complete_fn.engines.slots import EngineRoom, usual_engines
from complete_fn.engines.stoppable import Stop, StoppableEngine
from complete_fn.engines.throughput import Pace, PacedEngine, Throughput, Watch
from complete_fn.errors import StoreError, UnknownModelError
from complete_fn.execution.admission import Tools
from complete_fn.execution.answers import Answers
from complete_fn.execution.listener import Tell
from complete_fn.execution.runner import run
from complete_fn.history.device_time import note_device_time
from complete_fn.jobs.api_keys import KeyStore
from complete_fn.jobs.connections import Connections
from complete_fn.jobs.job_store import JobStore
from complete_fn.jobs.part_queue import PartQueue
from complete_fn.jobs.queue import InlineQueue, JobQueue
from complete_fn.jobs.uploads import Uploads
from complete_fn.jobs.worker_store import ModelState, WorkerStore
from complete_fn.ledger.pruning import prune
from complete_fn.logs import log_failure
from complete_fn.prompts.options import CacheMode
from complete_fn.rows.limits import TableLimits
from complete_fn.rows.object_storage import Storage
from complete_fn.settings import load_settings
from complete_fn.spending.shared_budget import Cap, SharedBudget, day_cap
from complete_fn.store.store import Store
from complete_fn.types import Asker


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of what a caller may send."""

    upload_bytes: int = 200 * 1024 * 1024
    body_bytes: int = 16 * 1024 * 1024
    table_bytes: int = 2 * 1024 * 1024 * 1024  # of a table once it is decoded
    job_rows: int = 10_000_000
    table_columns: int = 10_000
    batch_rows: int = 50_000

    @property
    def of_tables(self) -> TableLimits:
        return TableLimits(self.job_rows, self.table_bytes, self.table_columns)


class Service:
    """One service on one machine. Safe to use from several threads.

    Args:
        home: folder of the state; None takes COMPLETE_FN_HOME or the platform's user data folder.
        models_file: a TOML file over the built-in catalogue; None takes COMPLETE_FN_MODELS or the config folder's.
        engine: answers for every model of the catalogue; None takes each model's own.
        idle_seconds: engines are let go after so long without work.
        queue: how workers learn of work; None means that they are threads of this process.
        engine_home: where this process's engines have their sockets; None takes `home`, and shares them with all
            processes there.
    """

    def __init__(
        self,
        home: Path | str | None = None,
        models_file: Path | str | None = None,
        engine: Engine | None = None,
        limits: Limits = Limits(),
        idle_seconds: float = 300.0,
        queue: JobQueue | None = None,
        engine_home: Path | None = None,
    ) -> None:
        self.settings = load_settings(home, models_file)
        self.engine_settings = replace(self.settings, home=engine_home or self.settings.home)
        self.engine = engine
        self.limits = limits
        self.idle_seconds = idle_seconds
        self.store = Store(self.settings.store)
        self.keys = KeyStore(self.store)
        self.jobs, self.parts = JobStore(self.store), PartQueue(self.store)
        self.connections = Connections(self.store)
        self.storage = Storage(self.settings.storage or str(self.folder))
        self.uploads = Uploads(self.store, self.storage, limits.upload_bytes, self.settings.retention_days)
        self.workers = WorkerStore(self.store)
        self.queue: JobQueue = queue or InlineQueue()
        self.lock = threading.Lock()
        self.outputs_lock = threading.Lock()
        self.paces: dict[str, Pace] = {}
        self.room = EngineRoom(self.settings.engines or usual_engines(), self.unload, self.start_seconds)
        self.learnt: dict[str, Throughput] = {}
        self.busy_at = time.time()

    @property
    def folder(self) -> Path:
        """Uploads and results, unless the settings name another storage; what is being sent."""
        folder = self.settings.home / "service"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return folder

    def job_key(self, job: str, name: str = "") -> str:
        """A job's folder in the storage, or an object of it."""
        return f"jobs/{job}/{name}".rstrip("/")

    def models(self) -> dict[str, Model]:
        return load_catalogue(self.settings.models_file)

    def model(self, name: str) -> Model:
        """The catalogue's entry: a request can name neither a folder nor a Hub id.

        Raises:
            UnknownModelError: the name is not in the catalogue.
        """
        found = self.models().get(name)
        if found is None:
            raise UnknownModelError(f"Model {name!r} is not in this service's catalogue. GET /v1/models lists all.")
        return at_engine(found, self.engine)

    def engine_of(self, model: Model) -> Engine:
        return self.engine or engine_for(model, self.engine_settings)

    def complete(
        self,
        call: Call,
        prompts: Any,
        who: Asker,
        stop: threading.Event | None = None,
        cache: CacheMode = "on",
        cap: Cap | None = None,
        priority: int = 0,
        tell: Tell | None = None,
        watch: Watch | None = None,
    ) -> Answers:
        """`runner.run` within the tenant's budget of the day and, if given, `cap`; `stop` ends it.

        `tell` gets the text as it is made, `watch` is told how the rows get on.

        Raises:
            Stopped: `stop` was set; committed slices stay.
            EngineError, StoreError: see `runner.run`.
        """
        caps = [c for c in (cap, self.day_cap(who.tenant)) if c is not None]
        budget = SharedBudget(self.store, who.tenant, caps) if caps else None
        stop = stop or threading.Event()
        with self.at_work(call.model, stop) as (opened, pace):
            stoppable = StoppableEngine(opened, stop)
            engine = PacedEngine(stoppable, pace, watch or Watch())
            tools = Tools(engine, self.store, budget, priority=priority, tell=tell, pause=stoppable.pause)
            return run(call, prompts, tools, who, cache)

    @contextmanager
    def at_work(self, model: Model, stop: Stop) -> Iterator[tuple[Engine, Pace]]:
        """The model's engine, which stays for as long as anything runs on it.

        Raises:
            Stopped: `stop` was set while there was no room for it.
        """
        with self.room.place(model.name, stop, bounded=model.engine != "http" and self.engine is None):
            with self.lock:
                pace = self.paces.setdefault(model.name, Pace())
            pace.begin()
            try:
                yield self.engine_of(model), pace
            finally:
                pace.end()
                self.busy_at = time.time()

    def start_seconds(self, model: str) -> float | None:
        return self.paces[model].cold_seconds if model in self.paces else None

    def unload(self, name: str) -> None:
        """Close the model's engine; nothing runs on it.

        A failure is logged, not raised: the caller that waits for the slot did not cause it.
        """
        model = self.models().get(name)
        if model is None or self.engine is not None:
            return
        engine = self.engine_of(model)
        if name in self.paces:
            self.paces[name].cool()
        steps: tuple[Callable[[], object], ...] = (
            lambda: note_device_time(self.store, engine, model),
            lambda: let_go(engine),
        )
        for step in steps:
            try:
                step()
            except Exception as error:
                log_failure(f"unloading {name}", error)
        self.queue.bell.ring()  # what waits for its place has more parts

    def model_states(self) -> dict[str, ModelState]:
        """The models that were asked in this process."""
        models, found = self.models(), {}
        for name, pace in list(self.paces.items()):
            engine = self.engine_of(models[name]) if pace.warm and name in models else None
            measured = pace.measured
            pid = getattr(engine, "pid", None)
            found[name] = ModelState(pace.warm, measured.tokens_per_second, measured.cold_seconds, pid)
        return found

    def day_cap(self, tenant: str) -> Cap | None:
        """What the tenant may spend today (UTC), in all processes together. None: unbounded."""
        daily = self.keys.daily_nano(tenant)
        return None if daily is None else day_cap(daily)

    def upkeep(self) -> None:
        """Bounds of the stored answers kept, paces noted, idle engines let go. Cheap; called every few seconds."""
        prune(self.store, self.settings.cache_gib, self.settings.cache_days)
        measured = {name: pace.measured for name, pace in list(self.paces.items())}
        if measured != self.learnt:
            self.workers.learn(measured)
            self.learnt = measured
        self.room.vacate_idle(self.idle_seconds)

    def close(self) -> None:
        models = self.models()
        for name, pace in list(self.paces.items()):
            if pace.warm and name in models:
                with suppress(StoreError):  # an end without a database is an end
                    note_device_time(self.store, self.engine_of(models[name]), models[name])
        self.store.close()
