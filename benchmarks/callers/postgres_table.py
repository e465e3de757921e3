"""PostgreSQL: complete_table against complete() row by row: engine submissions and time, with the setting beside them.

Needs a PostgreSQL with plpython3u, in which the user of --dsn may make a database. The service runs in this process
on EchoEngine, which takes no time: what is measured is the way there and back, not a model.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import psycopg
import uvicorn
from read_databases import new_database

from complete_fn import Completion, CompletionRequest, EchoEngine
from complete_fn.server.app import make_app
from complete_fn.service.engine_host import EngineHost
from complete_fn.service.state import ServiceState

SQL = Path(__file__).parents[2] / "sql" / "complete_fn_sql" / "postgres_install.sql"
MODEL = "[models.echo]\ncheckpoint = 'echo'\nmax_model_len = 4096\n"


class Counting(EchoEngine):
    submissions = 0

    def stream(self, requests: Iterable[CompletionRequest], tenant: str) -> Iterator[tuple[int, Completion]]:
        self.submissions += 1
        return super().stream(requests, tenant)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dsn", default="host=127.0.0.1 user=postgres", help="without a database name")
    parser.add_argument("--rows", type=int, default=1000)
    chosen = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    (folder / "models.toml").write_text(MODEL)
    engine = Counting()
    engines = EngineHost(ServiceState(folder / "home", folder / "models.toml", engine))
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(make_app(engines), log_level="warning"))
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    with new_database(chosen.dsn) as name:
        dsn = f"{chosen.dsn} dbname={name}"
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        command = ["psql", "-X", "-q", "-d", dsn, "-f", str(SQL)]
        subprocess.run(command, env={**os.environ, "COMPLETE_FN_URL": url}, check=True)
        measure(dsn, engine, chosen.rows)
    server.should_exit = True
    thread.join(30)


def measure(dsn: str, engine: Counting, rows: int) -> None:
    ways = {
        "complete_table": "SELECT count(completion) FROM complete_table('SELECT body AS prompt FROM docs', 'echo')",
        "complete, row by row": "SELECT count(complete('echo', 'again ' || body)) FROM docs",
    }
    with psycopg.connect(dsn, autocommit=True) as con:
        con.execute(f"CREATE TABLE docs AS SELECT 'row ' || g AS body FROM generate_series(1, {rows}) AS g".encode())
        print(f"{rows:,} short rows, EchoEngine, SQLite state, PostgreSQL {con.info.server_version // 10000}")
        for name, query in ways.items():
            before, began = engine.submissions, time.monotonic()
            assert con.execute(query.encode()).fetchone() == (rows,)
            print(f"{name}: {engine.submissions - before:,} engine submissions, {time.monotonic() - began:.1f} s")


if __name__ == "__main__":
    main()
