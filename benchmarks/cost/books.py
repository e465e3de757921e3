"""How long lists, usage and metrics of a service with full books take, and what the sums by hour cost a commit.

    python benchmarks/cost/books.py                       SQLite, then a PostgreSQL of its own
    python benchmarks/cost/books.py --only sqlite --jobs 1000 --lines 100000

Fills a store with 10,000 jobs, 40,000 parts and 1,000,000 ledger lines of two tenants over 28 days. A service without
workers (`serve --workers 0`) then answers each request five times; the median counts, but for the first `/metrics`,
which is that of a service just started (the median of three starts). Commits are of 64 answers and 5 lines each, by one
committer and by eight threads on one job, in alternating blocks with and without the sums by hour: the ratio of the
medians, and the quartiles. The eight have engines of their own, then one together, so that all add to the same sums.
Goals: 100 jobs 0.2 s, usage 0.5 s, first metrics 1 s, commits 1.10.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import secrets
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import sqlalchemy as sa

sys.path.insert(0, str(Path(__file__).parents[2]))
from complete_fn.ledger.usage import usage
from complete_fn.store import store as store_module
from complete_fn.store.attempts import StoredAnswer
from complete_fn.store.job_tables import jobs, parts
from complete_fn.store.records import LedgerLine
from complete_fn.store.rollup import add_to_hours
from complete_fn.store.store import Store
from complete_fn.store.tables import attempts, ledger, ledger_hours
from complete_fn.types import Asker, Completion, Usage
from deploy.servers import Postgres, Redis, running

COMPLETE_FN = Path(sys.executable).with_name("complete-fn")
TENANTS = ("local", "other")
MODELS = ("llama-3.1-8b", "llama-3.1-70b", "demo-llama")
CLASSES = ("input", "cached_input", "output", "prefix_cache", "duplicate")
PARTS, DAYS, CHUNK, COMMITS = 4, 28, 500, 8


def fill(store: Store, count: int, lines: int) -> None:
    """Jobs that are over but for the last fifty; each has four parts with one attempt each."""
    began, draw = time.time() - DAYS * 86_400, random.Random(0)
    commits = max(1, lines // (count * PARTS * len(CLASSES)))
    for low in range(0, count, CHUNK):
        made: dict[str, list[dict[str, Any]]] = {"jobs": [], "parts": [], "attempts": [], "ledger": []}
        for n in range(low, min(count, low + CHUNK)):
            add_job(made, n, began + n * DAYS * 86_400 / count, n >= count - 50, commits, draw)
        with store.write() as connection:
            for table in (jobs, parts, attempts, ledger):
                connection.execute(table.insert(), made[table.name])
            add_to_hours(connection, made["ledger"])
    with store.write() as connection:
        connection.exec_driver_sql("ANALYZE")


def add_job(
    made: dict[str, list[dict[str, Any]]], n: int, at: float, is_open: bool, commits: int, draw: random.Random
) -> None:
    tenant, model, name = TENANTS[n % 2], MODELS[n % 3], f"job_{n:024d}"
    common = {"tenant": tenant, "user": "user", "model": model, "currency": "USD", "basis": "list", "query_tag": None}
    made["jobs"].append(
        {
            **common,
            "id": name,
            "kind": "table",
            "status": "running" if is_open else "completed",
            "rows": 1000,
            "nulls": 0,
            "priority": 0,
            "request": "{}",
            "created_at": at,
            "started_at": at + 1,
            "ended_at": None if is_open else at + 600,
        }
    )
    for number in range(PARTS):
        attempt = n * PARTS + number + 1
        done = not is_open or number < 2
        made["parts"].append(
            {
                "job": name,
                "tenant": tenant,
                "number": number,
                "status": "done" if done else "running",
                "model": model,
                "options": "{}",
                "rows": 250,
                "tokens": 25_000,
                "shared": 10,
                "claim": "claim",
                "worker": None if done else "host|1|1.0|0",
                "claimant": "host|1|1.0",
                "lease_until": time.time() + 1e6,
                "claimed_at": at + 1,
                "failed": 0,
            }
        )
        of_attempt = {"id": attempt, "job": f"{name}/{number}", "status": "ended", "host": "host", "pid": 1, "step": 1}
        times = {"pid_started": 1.0, "began": at, "seen_at": at, "reserved_rows": 0, "reserved_tokens": 0}
        made["attempts"].append({**common, **of_attempt, **times})
        for commit in range(commits):
            for price_class in CLASSES:
                figures = {"rows": 10, "tokens": draw.randrange(1000), "cost_nano": draw.randrange(10**6)}
                more = {"saved_nano": draw.randrange(10**6), "device_us": 1000, "saved_us": 10, "engine": "host/1"}
                line = {"at": at + 60 * commit + number, "attempt": attempt, "job": name, "price_class": price_class}
                made["ledger"].append({**common, **line, **figures, **more})


@contextmanager
def service(home: Path, database: str | None, broker: str) -> Iterator[httpx.Client]:
    command = [str(COMPLETE_FN), "serve", "--port", "0", "--workers", "0", "--broker", broker, "--home", str(home)]
    environment = {**os.environ, **({"COMPLETE_FN_DATABASE": database} if database else {})}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as serving:
        assert serving.stderr is not None
        try:
            line = next(line for line in serving.stderr if "serves http" in line)
            threading.Thread(target=lambda: [None for _ in serving.stderr or ()], daemon=True).start()
            with httpx.Client(base_url=line.split("serves ")[1].split("/v1")[0], timeout=120) as client:
                client.get("/readyz").raise_for_status()
                yield client
        finally:
            serving.terminate()


def timed(call: Callable[[], Any], times: int = 5) -> list[float]:
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        call()
        taken.append(time.perf_counter() - began)
    return taken


def get(client: httpx.Client, path: str) -> Callable[[], Any]:
    return lambda: client.get(path).raise_for_status()


def report(what: str, taken: list[float]) -> None:
    print(f"| {what} | {statistics.median(taken):.3f} s [{min(taken):.3f}-{max(taken):.3f}] |", flush=True)


def read_books(home: Path, database: str | None, broker: str) -> None:
    first = []
    for _ in range(3):
        with service(home, database, broker) as client:
            first += timed(get(client, "/metrics"), 1)
    report("first `/metrics` of a service", first)
    week = "since=" + time.strftime("%Y-%m-%dT%H:30:00", time.gmtime(time.time() - 7 * 86_400))
    with service(home, database, broker) as client:
        get(client, "/metrics")()
        for path in (
            "/metrics",
            "/v1/jobs?limit=20",
            "/v1/jobs?limit=100",
            "/v1/jobs?limit=1000",
            "/v1/usage",
            "/v1/usage?by=job",
            f"/v1/usage?{week}",
        ):
            report(f"`{path.replace(week, 'since=(7 days ago, half past)')}`", timed(get(client, path)))


def commit_blocks(store: Store, committers: int, shared: bool, pairs: int) -> None:
    """Alternate short blocks with and without the sums by hour; which is first alternates too.

    Args:
        shared: all committers add to the same sums, as engines that do not meter their devices do.
    """
    ways: dict[str, Any] = {"with": add_to_hours, "without": lambda connection, lines: None}
    taken: dict[str, list[float]] = {way: [] for way in ways}
    for pair in range(pairs):
        for way in sorted(ways, reverse=bool(pair % 2)):
            store_module.add_to_hours = ways[way]
            with ThreadPoolExecutor(committers) as pool:
                for found in pool.map(lambda n: commit_slices(store, "" if shared else n), range(committers)):
                    taken[way] += found
    store_module.add_to_hours = add_to_hours
    (_, middle, _), (_, usual, _) = quarters = [statistics.quantiles(taken[way], n=4) for way in ways]
    told = " / ".join(f"{m * 1e3:.2f} [{low * 1e3:.2f}-{high * 1e3:.2f}]" for low, m, high in quarters)
    name = f"a commit of {committers} committers{' on the same sums' * shared}, with / without"
    print(f"| {name} | {middle / usual:.3f} ({told} ms) |", flush=True)


def commit_slices(store: Store, engine: int | str) -> list[float]:
    """The seconds of each commit."""
    attempt = store.begin(Asker("local", "user", "job_of_commits/0"), MODELS[0], "USD", "list")
    lines = [LedgerLine(c, 64, 640, 640, engine=f"host/{engine}") for c in CLASSES]
    answer, taken = Completion("word " * 16, usage=Usage(100, 50, 16)), []
    for _ in range(COMMITS):
        done = [StoredAnswer(secrets.token_bytes(32), answer) for _ in range(64)]
        began = time.perf_counter()
        store.commit(attempt, done, lines, 0, 0)
        taken.append(time.perf_counter() - began)
    store.finish(attempt, "done")
    return taken


def measure(home: Path, database: str | None, asked: argparse.Namespace) -> None:
    store = Store(database or home / "state.sqlite3")
    began = time.perf_counter()
    fill(store, asked.jobs, asked.lines)
    with store.read() as connection:
        sizes = [
            connection.execute(sa.select(sa.func.count()).select_from(table)).scalar()
            for table in (jobs, parts, ledger, ledger_hours)
        ]
    print(f"\n{store.engine.dialect.name}: {sizes[0]:,} jobs, {sizes[1]:,} parts, {sizes[2]:,} lines in {sizes[3]:,} ")
    print(f"sums by hour, filled in {time.perf_counter() - began:.0f} s\n\n| what | seconds |\n|---|---|", flush=True)
    with running(Redis) as redis:
        read_books(home, database, f"redis://127.0.0.1:{redis.port}/0")
    report("`complete-fn usage` of all tenants, in process", timed(lambda: usage(store)))
    for committers, shared in ((1, False), (8, False), (8, True)):
        commit_blocks(store, committers, shared, asked.pairs)
    store.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=10_000)
    parser.add_argument("--lines", type=int, default=1_000_000)
    parser.add_argument("--only", choices=("sqlite", "postgresql"))
    parser.add_argument("--pairs", type=int, default=40, help=f"pairs of blocks of {COMMITS} commits a committer")
    asked = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)  # PostgreSQL runs as a user of its own
        if asked.only != "postgresql":
            (Path(folder) / "sqlite").mkdir()
            measure(Path(folder) / "sqlite", None, asked)
        if asked.only != "sqlite":
            server = Postgres(Path(folder) / "server")  # with a folder of its own it waits for the disk
            try:
                server.start()
                with server.database() as url:
                    measure(Path(folder) / "postgresql", url, asked)
            finally:
                server.remove()


if __name__ == "__main__":
    main()
