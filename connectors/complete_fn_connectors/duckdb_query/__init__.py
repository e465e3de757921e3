"""A whole DuckDB query as one plan."""
