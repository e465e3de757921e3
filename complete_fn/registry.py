"""Tables of what can be added: one file with the thing, one line here or in the table of its room.

The core reaches the rooms above it only by these names, `module:name`, imported on first use.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from complete_fn.errors import EngineMissingError

T = TypeVar("T")


class Table(Mapping[str, T]):
    """Entries of one kind by name, in the order in which they were added.

    Args:
        kind: what an entry is, for messages.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.entries: dict[str, T] = {}

    def add(self, name: str, entry: T) -> None:
        """Raises:
        ValueError: the table has an entry of that name.
        """
        if name in self.entries:
            raise ValueError(f"There is a {self.kind} {name!r} already.")
        self.entries[name] = entry

    def remove(self, name: str) -> None:
        del self.entries[name]

    def __getitem__(self, name: str) -> T:
        return self.entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


@dataclass(frozen=True)
class Verb:
    """A verb of the shell: `target` is called as verb(argv: list[str]) -> exit code; `what` is its line in the help."""

    target: str
    what: str


# Each is called as factory(model: catalogue.Model, settings: Settings) -> Engine.
ENGINES: Table[str] = Table("engine")
ENGINES.add("embedded", "complete_fn_workers.engine.client:open_engine")
ENGINES.add("http", "complete_fn.engines.http_engine:open_engine")
ENGINES.add("echo", "complete_fn.engines.base:open_engine")

# Databases that rows are read from, by the URL's scheme, beside those of SQLAlchemy. Each is called as
# database(url: str, read_only: bool, seconds: float | None) -> rows.databases.RowDatabase.
DATABASES: Table[str] = Table("database")
DATABASES.add("duckdb", "complete_fn_connectors.duckdb.database:open_database")

VERBS: Table[Verb] = Table("verb")
VERBS.add(
    "run",
    Verb("complete_fn.cli.run:main", "complete a column of prompts made from a Parquet, CSV, JSONL or Arrow file"),
)
VERBS.add(
    "models",
    Verb(
        "complete_fn.cli.local_state:models_main",
        "list the models of the catalogue: checkpoint, licence, context, prices, where tried",
    ),
)
VERBS.add(
    "usage",
    Verb("complete_fn.cli.local_state:usage_main", "sum the ledger: rows, tokens and cost by day and model"),
)
VERBS.add("cache", Verb("complete_fn.cli.local_state:cache_main", "show or clear the stored answers"))
VERBS.add("serve", Verb("complete_fn.cli.serve:serve_main", "serve OpenAI's API and jobs for tables from this machine"))
VERBS.add("worker", Verb("complete_fn_workers.worker:main", "run the jobs of a service that was started with a broker"))
VERBS.add("jobs", Verb("complete_fn.cli.jobs:main", "submit, watch and fetch jobs of a service"))
VERBS.add(
    "keys",
    Verb("complete_fn.cli.serve:keys_main", "make, list and revoke API keys of the service; bound a tenant's spending"),
)
VERBS.add(
    "connections",
    Verb("complete_fn.cli.connections:main", "register databases that a tenant's jobs may read and write"),
)
VERBS.add(
    "setup-engine",
    Verb("complete_fn_workers.setup_engine:main", "install the embedded engine (vLLM) into this Python environment"),
)
VERBS.add("swiftkv", Verb("complete_fn_workers.swiftkv.cli:main", "make SwiftKV checkpoints: convert, distill, eval"))

# Each is called as dialect() -> service.call_out.Dialect; /v1/dialects/NAME/... speaks it.
DIALECTS: Table[str] = Table("dialect")
DIALECTS.add("snowflake", "complete_fn_connectors.warehouses.snowflake:Snowflake")
DIALECTS.add("bigquery", "complete_fn_connectors.warehouses.bigquery:BigQuery")
DIALECTS.add("redshift", "complete_fn_connectors.warehouses.redshift:Redshift")
DIALECTS.add("postgres", "complete_fn_connectors.warehouses.postgres:Postgres")

# What brings a library that may be missing.
REMEDIES: dict[str, str] = {
    "vllm": "complete-fn setup-engine",
    "torch": "complete-fn setup-engine",
    "transformers": "complete-fn setup-engine",
    "safetensors": "complete-fn setup-engine",
    "duckdb": "pip install 'complete-fn[duckdb]'",
    "polars": "pip install 'complete-fn[polars]'",
    "pymysql": "pip install 'complete-fn[databases]'",
    "fastapi": "pip install 'complete-fn[service]'",
    "uvicorn": "pip install 'complete-fn[service]'",
    "psycopg": "pip install 'complete-fn[service]'",
    "celery": "pip install 'complete-fn[fleet]'",
    "redis": "pip install 'complete-fn[fleet]'",
    "python_multipart": "pip install 'complete-fn[service]'",
    "prometheus_client": "pip install 'complete-fn[service]'",
}


def resolve(target: str) -> Callable[..., Any]:
    """The object named `module:name`.

    Raises:
        EngineMissingError: a library is not installed; the message has the command that brings it.
    """
    module, _, name = target.partition(":")
    try:
        found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        raise missing(error.name or module) from error
    return found


def missing(library: str) -> EngineMissingError:
    root = library.partition(".")[0]
    remedy = REMEDIES.get(root, f"pip install '{root}'")
    return EngineMissingError(f"{root!r} is not installed. Bring it with: {remedy}")
