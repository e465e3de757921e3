"""Peak memory and time of `complete-fn run` over 1 and 10 million rows, answered by EchoEngine.

The rows come from a Parquet file, or from a table of a PostgreSQL, in a database that is made for it and dropped.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
from pyarrow import parquet
from read_databases import docs

from complete_fn.rows.readers import WINDOW_BYTES, WINDOW_ROWS

MODELS = '[models.echo]\ncheckpoint = "echo"\nengine = "echo"\nprices = { input = 1, output = 1 }\n'
FILL = "is described here in words that fill the line "
STEP = 100_000


def write_rows(path: Path, rows: int) -> None:
    """`rows` different texts of about 60 characters."""
    schema = pa.schema([("id", pa.int64()), ("text", pa.string())])
    with parquet.ParquetWriter(path, schema) as writer:
        for low in range(0, rows, STEP):
            ids = range(low, min(low + STEP, rows))
            writer.write_table(pa.table({"id": ids, "text": [f"{n} {FILL}" for n in ids]}, schema))


@contextmanager
def source(server: str | None, folder: Path, rows: int) -> Iterator[list[str]]:
    """The arguments that name the rows."""
    if server is None:
        write_rows(folder / "in.parquet", rows)
        yield [str(folder / "in.parquet")]
        return
    with docs(server, f"SELECT i AS id, i || ' {FILL}' AS text FROM generate_series(1, {rows}) i") as url:
        yield [url, "--table", "docs", "--key", "id"]


def measured(folder: Path, given: list[str], kind: str) -> tuple[float, float]:
    """(seconds, peak MB) of one run in a process of its own."""
    code = "import sys; from complete_fn.cli.main import main; sys.exit(main())"
    given = ["run", "-m", "echo", "-p", "{text}", *given, "-o", str(folder / f"out.{kind}")]
    began = time.perf_counter()
    child = subprocess.Popen([sys.executable, "-c", code, *given, "--max-tokens", "4", "--quiet", "--overwrite"])
    _, status, used = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"the run ends with status {status}")
    return time.perf_counter() - began, used.ru_maxrss * 1024 / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", type=int, nargs="*", default=[1_000_000, 10_000_000])
    parser.add_argument("--format", default="parquet", choices=("parquet", "jsonl", "csv", "arrow"))
    parser.add_argument("--server", help="read from this PostgreSQL: postgresql://USER@HOST, who may make databases")
    a = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, pyarrow {pa.__version__}")
    print(f"windows of {WINDOW_ROWS:,} rows or {WINDOW_BYTES / 1e6:,.0f} MB; state in SQLite")
    for rows in a.rows:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "models.toml").write_text(MODELS)
            os.environ.update(COMPLETE_FN_MODELS=str(folder / "models.toml"), COMPLETE_FN_HOME=str(folder / "home"))
            with source(a.server, folder, rows) as given:
                seconds, peak = measured(folder, given, a.format)
        print(f"{rows:>11,} rows: {seconds:,.0f} s, {rows / seconds:,.0f} rows/s, peak {peak:,.0f} MB")


if __name__ == "__main__":
    main()
