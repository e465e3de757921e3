"""DuckDB: `register(con)` and what works on a registered connection."""

from complete_fn_connectors.duckdb.register import Registration, estimate, explain, register, registration_of, sql

__all__ = ["Registration", "estimate", "explain", "register", "registration_of", "sql"]
