"""The one table by which the core reaches the rooms above it: kind -> `module:name`, imported on first use."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from complete_fn.errors import EngineMissingError

# Each is called as factory(model: catalogue.Model, settings: Settings) -> Engine.
ENGINES: dict[str, str] = {
    "embedded": "complete_fn_workers.embedded:open_engine",
    "http": "complete_fn.engines.http_engine:open_engine",
    "echo": "complete_fn.engines.base:open_engine",
}

# Each is called as database(url: str, read_only: bool, seconds: float | None) -> row_databases.Database.
DATABASES: dict[str, str] = {
    "duckdb": "complete_fn_connectors.duckdb_tables:open_database",
}

# Each is called as verb(argv: list[str]) -> exit code.
VERBS: dict[str, str] = {
    "run": "complete_fn.cli.run:main",
    "models": "complete_fn.cli.local_state:models_main",
    "usage": "complete_fn.cli.local_state:usage_main",
    "cache": "complete_fn.cli.local_state:cache_main",
    "serve": "complete_fn.cli.serve:serve_main",
    "worker": "complete_fn_workers.worker:main",
    "jobs": "complete_fn.cli.jobs:main",
    "keys": "complete_fn.cli.serve:keys_main",
    "connections": "complete_fn.cli.connections:main",
    "setup-engine": "complete_fn_workers.setup_engine:main",
    "swiftkv": "complete_fn_workers.swiftkv.cli:main",
}

# Each is called as dialect() -> dialects.Dialect; /v1/dialects/NAME/... speaks it.
DIALECTS: dict[str, str] = {
    "snowflake": "complete_fn_connectors.snowflake:Snowflake",
    "bigquery": "complete_fn_connectors.bigquery:BigQuery",
    "redshift": "complete_fn_connectors.redshift:Redshift",
    "postgres": "complete_fn_connectors.postgres:Postgres",
}

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
