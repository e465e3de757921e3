"""A whole DuckDB query as one plan (`sql`) against the plain scalar function (`con.execute`), on the real engine.

Both sides ask the same model through the same embedded engine, alternating, each run with a state folder and a cache
salt of its own, so that no run finds another's answers or prefixes. A submission is one stream of prompts handed to
the engine; a step is one forward pass of it, counted by the engine's process.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb

from complete_fn.engines.base import Engine
from complete_fn.engines.catalogue import find_model
from complete_fn.engines.pool import engine_for
from complete_fn.settings import load_settings
from complete_fn.types import Asker, Completion, CompletionRequest
from complete_fn_connectors.duckdb import register, sql
from complete_fn_workers.engine.launch import connect_if_running
from complete_fn_workers.engine.link import Link

SAMPLE = Path(__file__).parents[2] / "sql" / "examples" / "packages.parquet"
CHEAP, STRONG = "demo-llama", "demo-strong"  # the same weights in two engines: what a cascade saves is its prompts
SECTION, SYNOPSIS = "'Name the section: ' || description", "'Write a one-line synopsis: ' || description"
QUERIES = {
    "a: filter to 0.1 %": f"SELECT id, complete('{CHEAP}', {SECTION}) FROM big WHERE hash(id) % 1000 = 0",
    "b: two calls in a CTE": f"WITH c AS (SELECT id, description, complete('{CHEAP}', {SECTION}) AS s FROM big "
    f"WHERE hash(id) % 4000 = 1) SELECT complete('{CHEAP}', 'Write a one-line synopsis: ' || s || description) FROM c",
    "c: beside a cheap predicate": f"SELECT id FROM small WHERE complete('{CHEAP}', {SECTION}) = 'utils' "
    "AND length(description) % 40 = 0",
    "d: coalesce of two models": f"SELECT coalesce(nullif(complete('{CHEAP}', {SECTION}), 'utils'), "
    f"complete('{STRONG}', {SYNOPSIS})) FROM big WHERE hash(id) % 4000 = 2",
    "e: after ORDER BY": f"SELECT complete('{CHEAP}', {SECTION}) FROM "
    "(SELECT description FROM big WHERE hash(id) % 2500 = 3 ORDER BY id)",
    "f: joined to more rows": f"SELECT v.s, count(*) FROM (SELECT id, complete('{CHEAP}', {SECTION}) AS s FROM small) "
    "v JOIN events e USING (id) GROUP BY v.s",
}


@dataclass
class Counted:
    """An engine whose submissions and prompts are counted."""

    engine: Engine
    counts: dict[str, int]

    def stream(self, requests: Iterable[CompletionRequest], tenant: str) -> Iterator[tuple[int, Completion]]:
        self.counts["submissions"] += 1
        for found in self.engine.stream(requests, tenant):
            self.counts["prompts"] += 1
            yield found

    def count_tokens(self, texts: list[str]) -> list[int]:
        return self.engine.count_tokens(texts)

    def close(self) -> None:
        self.engine.close()


def steps(engines: list[Any]) -> int:
    """Forward passes that the processes of these engines have made so far."""
    total = 0
    for engine in engines:
        link = connect_if_running(engine.place)
        if link is None:
            continue
        connection = Link(link)
        connection.receive()
        connection.send({"count": []})
        total += int(connection.receive()["steps"])
        connection.close()
    return total


def models_file(folder: Path) -> Path:
    """The catalogue with the demonstration model under a second name, in an engine of its own."""
    model = find_model(CHEAP)
    path = folder / "models.toml"
    path.write_text(
        f'[models.{STRONG}]\ncheckpoint = "{model.local_folder}"\nmax_model_len = 2048\ndefault_max_tokens = 128\n'
        "engine_args = { enforce_eager = true, block_size = 32, max_num_seqs = 64, max_num_batched_tokens = 4096 }\n"
    )
    return path


def tables(con: duckdb.DuckDBPyConnection, rows: int) -> None:
    con.execute(f"CREATE TABLE small AS SELECT row_number() OVER () AS id, * FROM '{SAMPLE}'")
    con.execute("CREATE TABLE events AS SELECT 7 + i % 90 * 20 AS id FROM range(100_000) t(i)")
    count = con.execute("SELECT count(*) FROM small").fetchall()[0][0]
    picked = f"SELECT i, 1 + (hash(i) // 4096 % {count})::BIGINT AS pick FROM range({rows}) t(i)"
    con.execute(
        f"CREATE TABLE big AS SELECT r.i AS id, package, description FROM ({picked}) r JOIN small s ON s.id = r.pick"
    )


def run(side: str, query: str, con: duckdb.DuckDBPyConnection, models: Path, salt: str) -> dict[str, Any]:
    counts = {"submissions": 0, "prompts": 0}
    settings = load_settings(models.parent, models)  # a home has engines of its own; these are all runs'
    with (
        tempfile.TemporaryDirectory() as home,
        register(con, home=home, models_file=models, progress=False) as registered,
    ):
        session = registered.session
        session.who = Asker(tenant=salt)
        session.engine_of = lambda model: Counted(engine_for(model, settings), counts)  # type: ignore[method-assign]
        engines = [engine_for(session.model(name), settings) for name in (CHEAP, STRONG) if name in query]
        before, began = steps(engines), time.perf_counter()
        rows = con.execute(query).fetchall() if side == "plain" else sql(con, query).fetchall()
        seconds = time.perf_counter() - began
        return {**counts, "steps": steps(engines) - before, "seconds": seconds, "rows": sorted(map(repr, rows))}


def warm_up(con: duckdb.DuckDBPyConnection, models: Path) -> None:
    for name in (CHEAP, STRONG):
        run("plain", f"SELECT complete('{name}', 'Name the section: warm up')", con, models, "warm")


def measure(name: str, pairs: int, con: duckdb.DuckDBPyConnection, models: Path) -> None:
    found = []
    for pair in range(pairs):
        order = ("plain", "whole") if pair % 2 == 0 else ("whole", "plain")
        found.append({s: run(s, QUERIES[name], con, models, f"{name}-{pair}-{s}") for s in order})
    plain, whole = found[-1]["plain"], found[-1]["whole"]
    differing = sum(a != b for a, b in zip(plain["rows"], whole["rows"], strict=True))
    ratios = [f["plain"]["seconds"] / f["whole"]["seconds"] for f in found]
    for side, last in (("plain", plain), ("whole", whole)):
        seconds = statistics.median(f[side]["seconds"] for f in found)
        print(
            f"{name:>28} {side}: {last['submissions']:>4} submissions, {last['steps']:>5} steps, "
            f"{last['prompts']:>5} prompts, {seconds:6.2f} s"
        )
    print(
        f"{'':>28} {plain['submissions'] / whole['submissions']:.0f}x fewer submissions, "
        f"{statistics.median(ratios):.2f}x less time [{min(ratios):.2f}-{max(ratios):.2f}], "
        f"{len(plain['rows'])} rows, {differing} differ",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--only", help="letters of queries: ab")
    a = parser.parse_args()
    warnings.simplefilter("ignore")
    model = find_model(CHEAP)
    print(
        f"{platform.machine()}, {os.cpu_count()} cores; DuckDB {duckdb.__version__}; {CHEAP}, {dict(model.engine_args)}"
    )
    print(
        f"{a.rows:,} rows in `big`, {a.pairs} pairs, alternating; start-up excluded; medians, counts of the last pair"
    )
    with tempfile.TemporaryDirectory() as folder, duckdb.connect() as con:
        models = models_file(Path(folder))
        tables(con, a.rows)
        warm_up(con, models)
        for name in QUERIES:
            if a.only is None or name[0] in a.only:
                measure(name, a.pairs, con, models)


if __name__ == "__main__":
    main()
