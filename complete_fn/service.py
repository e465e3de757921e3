"""What API routes and worker threads share: one store, the catalogue, engines, budgets. Knows no HTTP."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from complete_fn.answers import Answers
from complete_fn.bounds import prune
from complete_fn.budget import Budget
from complete_fn.catalogue import Model, load_catalogue
from complete_fn.engine import Engine
from complete_fn.engines import at_engine, close_engines, engine_for
from complete_fn.errors import UnknownModelError
from complete_fn.job_store import JobStore
from complete_fn.key_store import KeyStore
from complete_fn.keys import Call
from complete_fn.ledger import money
from complete_fn.options import CacheMode
from complete_fn.queue import InlineQueue, JobQueue
from complete_fn.runner import Tools, run
from complete_fn.settings import load_settings
from complete_fn.stoppable import StoppableEngine
from complete_fn.store import Store
from complete_fn.tables import ledger
from complete_fn.types import Asker
from complete_fn.uploads import Uploads

TABLES_AT_ONCE = 2


class Budgets(Budget):
    """Several budgets that must all cover a row; told as the one with the least left."""

    def __init__(self, budgets: Sequence[Budget]) -> None:
        self.budgets = budgets

    @property
    def tightest(self) -> Budget:
        return min(self.budgets, key=lambda b: b.limit - b.spent)

    @property
    def limit(self) -> Decimal:  # type: ignore[override]
        return self.tightest.limit

    @property
    def spent(self) -> Decimal:  # type: ignore[override]
        return self.tightest.spent

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.tightest.name

    def hopeless(self, worst: Decimal) -> bool:
        return any(b.hopeless(worst) for b in self.budgets)

    def reserve(self, worst: Decimal) -> bool:
        for number, budget in enumerate(self.budgets):
            if not budget.reserve(worst):
                for earlier in self.budgets[:number]:
                    earlier.settle(worst, Decimal(0))
                return False
        return True

    def settle(self, worst: Decimal, actual: Decimal) -> None:
        for budget in self.budgets:
            budget.settle(worst, actual)


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of what a caller may send."""

    upload_bytes: int = 200 * 1024 * 1024
    body_bytes: int = 16 * 1024 * 1024
    table_bytes: int = 2 * 1024 * 1024 * 1024  # of a table once it is decoded
    job_rows: int = 10_000_000
    batch_rows: int = 50_000


class Service:
    """One service on one machine. Safe to use from several threads.

    Args:
        home: folder of the state; None takes COMPLETE_FN_HOME or the platform's user data folder.
        models_file: a TOML file over the built-in catalogue; None takes COMPLETE_FN_MODELS or the config folder's.
        engine: answers for every model of the catalogue; None takes each model's own.
        idle_seconds: engines are let go after so long without work.
    """

    def __init__(
        self,
        home: Path | str | None = None,
        models_file: Path | str | None = None,
        engine: Engine | None = None,
        limits: Limits = Limits(),
        idle_seconds: float = 300.0,
    ) -> None:
        self.settings = load_settings(home, models_file)
        self.engine = engine
        self.limits = limits
        self.idle_seconds = idle_seconds
        self.store = Store(self.settings.home / "state.sqlite3")
        self.keys = KeyStore(self.store)
        self.jobs = JobStore(self.store)
        self.uploads = Uploads(self.store, self.folder / "files", limits.upload_bytes)
        self.queue: JobQueue = InlineQueue()
        self.lock = threading.Lock()
        self.outputs_lock = threading.Lock()
        self.tables_at_once = threading.BoundedSemaphore(TABLES_AT_ONCE)  # whole tables are in memory meanwhile
        self.days: dict[tuple[str, str], Budget] = {}
        self.running = 0
        self.last_run = time.monotonic()
        self.warm = False

    @property
    def folder(self) -> Path:
        """Uploads and results."""
        return self.settings.home / "service"

    def job_folder(self, job: str) -> Path:
        return self.folder / "jobs" / job

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
        return self.engine or engine_for(model, self.settings)

    def complete(
        self,
        call: Call,
        prompts: Any,
        who: Asker,
        stop: threading.Event | None = None,
        cache: CacheMode = "on",
        budget: Budget | None = None,
    ) -> Answers:
        """`runner.run` within the tenant's budget and, if given, `budget`; `stop` ends it.

        Raises:
            Stopped: `stop` was set; committed slices stay.
            EngineError, StoreError: see `runner.run`.
        """
        budgets = [b for b in (budget, self.day_budget(who.tenant)) if b is not None]
        engine = StoppableEngine(self.engine_of(call.model), stop or threading.Event())
        with self.at_work():
            return run(call, prompts, Tools(engine, self.store, Budgets(budgets) if budgets else None), who, cache)

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Engines stay for as long as anything runs."""
        with self.lock:
            self.running += 1
            self.warm = True
        try:
            yield
        finally:
            with self.lock:
                self.running -= 1
                self.last_run = time.monotonic()

    def day_budget(self, tenant: str) -> Budget | None:
        """What the tenant may spend today (UTC); shared by all its runs. None: unbounded."""
        daily = self.keys.daily_nano(tenant)
        if daily is None:
            return None
        today = datetime.now(UTC).date()
        with self.lock:
            budget = self.days.get((tenant, today.isoformat()))
            if budget is None:
                midnight = datetime(today.year, today.month, today.day, tzinfo=UTC).timestamp()
                spent = self.spent_since(tenant, midnight)
                budget = self.days[tenant, today.isoformat()] = Budget(money(daily), spent, "The tenant's daily budget")
            budget.limit = money(daily)
            return budget

    def spent_since(self, tenant: str, at: float) -> Decimal:
        billed = sa.select(sa.func.sum(ledger.c.cost_nano)).where(ledger.c.tenant == tenant, ledger.c.at >= at)
        with self.store.read() as connection:
            return money(connection.execute(billed).scalar() or 0)

    def upkeep(self) -> None:
        """Bounds of the stored answers kept, idle engines let go. Cheap; called every few seconds."""
        prune(self.store, self.settings.cache_gib, self.settings.cache_days)
        with self.lock:
            idle = not self.running and time.monotonic() - self.last_run > self.idle_seconds
            if not (idle and self.warm):
                return
            self.warm = False
        close_engines()

    def close(self) -> None:
        self.store.close()
