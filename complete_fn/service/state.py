"""The state of one service: its settings, stores, storage and queue, which all its processes share."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path

from complete_fn.engines.base import Engine
from complete_fn.engines.catalogue import Model, load_catalogue
from complete_fn.engines.pool import at_engine
from complete_fn.errors import InvalidOptionError, UnknownModelError
from complete_fn.jobs.api_keys import KeyStore
from complete_fn.jobs.connections import Connections
from complete_fn.jobs.job_store import JobStore
from complete_fn.jobs.part_queue import PartQueue
from complete_fn.jobs.queue import InlineQueue, JobQueue
from complete_fn.jobs.storage_quota import StorageQuota
from complete_fn.jobs.uploads import Uploads
from complete_fn.jobs.worker_store import WorkerStore
from complete_fn.rows.limits import TableLimits
from complete_fn.rows.object_storage import Storage
from complete_fn.settings import load_settings
from complete_fn.spending.budget import refuse_unpriced
from complete_fn.spending.shared_budget import Cap, day_cap
from complete_fn.store.store import Store

NO_BUDGET = (
    "Tenant {0!r} has a daily budget in {1}, and {2!r} is priced in {3}. The operator can set one: "
    "complete-fn keys budget {0} AMOUNT --currency {3}"
)


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds on what a caller may send."""

    upload_bytes: int = 200 * 1024 * 1024
    body_bytes: int = 16 * 1024 * 1024
    table_bytes: int = 2 * 1024 * 1024 * 1024  # of a table once it is decoded
    job_rows: int = 10_000_000
    job_prompt_bytes: int = 32 * 1024 * 1024 * 1024  # of a job's prompts together: 3,400 for each of so many rows
    table_columns: int = 10_000
    batch_rows: int = 50_000

    @property
    def of_tables(self) -> TableLimits:
        return TableLimits(self.job_rows, self.table_bytes, self.table_columns)


class ServiceState:
    """Opens the stores, storage and queue of a service. It runs nothing. Safe to use from several threads.

    Args:
        home: folder of the state; None takes COMPLETE_FN_HOME or the platform's user data folder.
        models_file: a TOML file over the built-in catalogue; None takes COMPLETE_FN_MODELS or the config folder's.
        engine: an engine that answers for every model of the catalogue; None takes each model's own.
        queue: tells workers that there is work; None means that the workers are threads of this process.
    """

    def __init__(
        self,
        home: Path | str | None = None,
        models_file: Path | str | None = None,
        engine: Engine | None = None,
        limits: Limits = Limits(),
        queue: JobQueue | None = None,
    ) -> None:
        self.settings = load_settings(home, models_file)
        self.engine = engine
        self.limits = limits
        self.store = Store(self.settings.store, waits_for_space=True)
        self.keys = KeyStore(self.store)
        self.quota = StorageQuota(self.store, self.settings.tenant_storage)
        self.jobs, self.parts = JobStore(self.store, self.quota), PartQueue(self.store)
        self.connections = Connections(self.store)
        self.storage = Storage(self.settings.storage or str(self.folder))
        kept_days = self.settings.retention_days
        self.uploads = Uploads(self.store, self.storage, limits.upload_bytes, kept_days, self.quota)
        self.workers = WorkerStore(self.store)
        self.queue: JobQueue = queue or InlineQueue()
        self.outputs_lock = threading.Lock()

    @property
    def folder(self) -> Path:
        """The folder of results that are being sent; of uploads and results too, if no other storage is set."""
        folder = self.settings.home / "service"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return folder

    def job_key(self, job: str, name: str = "") -> str:
        """The key of a job's folder in the storage, or of an object in that folder."""
        return f"jobs/{job}/{name}".rstrip("/")

    def models(self) -> dict[str, Model]:
        return load_catalogue(self.settings.models_file)

    def model(self, name: str) -> Model:
        """The catalogue's entry. A request cannot name a folder or a Hub id.

        Raises:
            UnknownModelError: The name is not in the catalogue.
        """
        found = self.models().get(name)
        if found is None:
            raise UnknownModelError(f"Model {name!r} is not in this service's catalogue. GET /v1/models lists all.")
        return at_engine(found, self.engine)

    def day_cap(self, tenant: str, model: Model) -> Cap | None:
        """The cap on what the tenant may spend in a day (UTC) in all processes together; None for no cap.

        Raises:
            InvalidOptionError: The tenant has a daily budget, but none in the currency of the model's prices, or the
                prices are not known.
        """
        daily, currency = self.keys.daily_budgets(tenant), model.prices.currency
        if not daily:
            return None
        refuse_unpriced(model, "The tenant's daily budget")
        if currency not in daily:
            raise InvalidOptionError(NO_BUDGET.format(tenant, ", ".join(daily), model.name, currency))
        return day_cap(daily[currency], currency)

    def close(self) -> None:
        self.store.close()
