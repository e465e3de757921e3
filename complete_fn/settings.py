"""Where state lives and what the environment says: the only module that reads `os.environ`.

COMPLETE_FN_HOME     folder of answers, ledger and engine sockets (default: the platform's user data folder)
COMPLETE_FN_DATABASE where answers, ledger and jobs are kept: postgresql://USER:PASSWORD@HOST:PORT/DATABASE
                     (default: state.sqlite3 in COMPLETE_FN_HOME)
COMPLETE_FN_MODELS   a TOML file that adds to or overrides the catalogue (default: models.toml in the config folder)
COMPLETE_FN_MEMORY   GiB that the embedded engine may take for its KV cache (default: a tenth of RAM, 1 to 8)
COMPLETE_FN_ENGINES  models of which a service's process holds an engine at once (default: 1 where there is an NVIDIA or
                     AMD accelerator, as vLLM takes its memory for one; else no bound)
COMPLETE_FN_CACHE_GIB, COMPLETE_FN_CACHE_DAYS
                     bounds of the stored answers (default: 2 GiB, 180 days); the oldest go first
COMPLETE_FN_BROKER   the Redis URL over which a service tells its worker processes that there is work
COMPLETE_FN_STORAGE  where a service keeps uploads, parts and results: a folder, s3://bucket/path or gs://bucket/path
                     (default: a folder of its home)
COMPLETE_FN_SOURCES, COMPLETE_FN_SINKS
                     roots under which jobs may read and write, separated by spaces: folders or s3:// prefixes;
                     {tenant} stands for the tenant's name (default: none)
COMPLETE_FN_RETENTION_DAYS
                     uploads, and jobs that are over, are deleted after so long (default: 30)
COMPLETE_FN_LEDGER_DAYS
                     a service deletes single lines of the ledger after so long, and keeps their sums by hour for ever
                     (at least 30; default: it deletes none)
COMPLETE_FN_SQL_SECONDS
                     what a job's SQL may take (default: 300)
COMPLETE_FN_TENANT_STORAGE
                     bytes that a tenant's uploads, jobs and results may take in the service's storage, unless
                     `complete-fn keys storage` sets another number (default: 53687091200, which is 50 GiB)
COMPLETE_FN_CONNECTIONS
                     connections that the API keeps open at once; one address may have three quarters of them (default:
                     4096, or as many as the limit of open files allows)
COMPLETE_FN_SECRET   what the API and its workers know each other by (default: a file in COMPLETE_FN_HOME)
COMPLETE_FN_URL, COMPLETE_FN_KEY
                     the service that `complete-fn jobs` asks, and its API key; also sent for engine='http://...' there
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from pathlib import Path

import platformdirs

from complete_fn.errors import InvalidOptionError

APP = "complete-fn"
CACHE_GIB, CACHE_DAYS = 2.0, 180.0
RETENTION_DAYS, SQL_SECONDS = 30.0, 300.0
LEDGER_DAYS = 30.0  # at least: a job that was stopped can go on for so long, and reads from its lines what it has spent
TENANT_STORAGE = 50 * 1024**3  # bytes


@dataclass(frozen=True, slots=True)
class Settings:
    home: Path
    models_file: Path | None
    kv_cache_gib: float | None
    cache_gib: float = CACHE_GIB
    cache_days: float = CACHE_DAYS
    internal_secret: str | None = field(default=None, repr=False)
    database: str | None = field(default=None, repr=False)  # may hold a password
    broker: str | None = field(default=None, repr=False)  # may hold a password
    storage: str | None = None
    sources: tuple[str, ...] = ()
    sinks: tuple[str, ...] = ()
    retention_days: float = RETENTION_DAYS
    sql_seconds: float = SQL_SECONDS
    ledger_days: float | None = None
    engines: int | None = None
    connections: int | None = None
    tenant_storage: int = TENANT_STORAGE

    @property
    def store(self) -> str:
        """What `Store` opens."""
        return self.database or str(self.home / "state.sqlite3")


def load_settings(home: Path | str | None = None, models_file: Path | str | None = None) -> Settings:
    """What was given, over the environment, over the platform's folders."""
    database = os.environ.get("COMPLETE_FN_DATABASE")
    home = home or os.environ.get("COMPLETE_FN_HOME")
    models = models_file or os.environ.get("COMPLETE_FN_MODELS")
    default_models = Path(platformdirs.user_config_dir(APP)) / "models.toml"
    return Settings(
        home=Path(home) if home else Path(platformdirs.user_data_dir(APP, appauthor=False)),
        models_file=Path(models) if models else default_models if default_models.exists() else None,
        kv_cache_gib=amount("COMPLETE_FN_MEMORY"),
        cache_gib=amount("COMPLETE_FN_CACHE_GIB") or CACHE_GIB,
        cache_days=amount("COMPLETE_FN_CACHE_DAYS") or CACHE_DAYS,
        internal_secret=os.environ.get("COMPLETE_FN_SECRET"),
        database=database or None,
        broker=os.environ.get("COMPLETE_FN_BROKER") or None,
        storage=os.environ.get("COMPLETE_FN_STORAGE") or None,
        sources=tuple(os.environ.get("COMPLETE_FN_SOURCES", "").split()),
        sinks=tuple(os.environ.get("COMPLETE_FN_SINKS", "").split()),
        retention_days=amount("COMPLETE_FN_RETENTION_DAYS") or RETENTION_DAYS,
        sql_seconds=amount("COMPLETE_FN_SQL_SECONDS") or SQL_SECONDS,
        ledger_days=amount("COMPLETE_FN_LEDGER_DAYS", LEDGER_DAYS),
        engines=math.ceil(amount("COMPLETE_FN_ENGINES") or 0) or None,
        tenant_storage=math.ceil(amount("COMPLETE_FN_TENANT_STORAGE") or TENANT_STORAGE),
        connections=math.ceil(amount("COMPLETE_FN_CONNECTIONS") or 0) or None,
    )


def amount(name: str, least: float = 0.0) -> float | None:
    """A number above 0, and at least `least`, from the environment; None if it is not set."""
    text = os.environ.get(name)
    if not text:
        return None
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not 0 < found < math.inf:
        raise InvalidOptionError(f"{name}={text!r} in the environment must be a number above 0.")
    if found < least:
        raise InvalidOptionError(f"{name}={text!r} in the environment must be at least {least:g}.")
    return found


def secret(name: str) -> str | None:
    """A key by the name of its environment variable; its value is never stored or logged."""
    return os.environ.get(name)


def named_devices() -> str | None:
    """The accelerators that the environment leaves us, as CUDA reads it; None: all."""
    return os.environ.get("CUDA_VISIBLE_DEVICES")


def child_environment(extra: dict[str, str]) -> dict[str, str]:
    """This process's environment with `extra` on top, for an engine process that is about to be started."""
    return {**os.environ, **extra}
