"""The estimate against the bill: list price and device-seconds of five jobs, said before and measured after.

Each job first answers a pilot of its rows, as a user would who tries a query on a sample; the estimate of the other
rows then rests on the pilot's answers and on all runs before. Then the rest is answered and billed. Every round
begins without past runs, on a warm engine, and has the jobs in the other order; a tenant of its own finds an empty
prefix cache. Errors are estimate / bill - 1 of the pairs: median [smallest, largest], as a machine's speed may swing
by more between two pairs than an estimate errs. The bills' own spread is (largest - smallest) / median.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.ordering.order_tables import Table, tables
from complete_fn import Session
from complete_fn.engines.call import Call
from complete_fn.estimates.estimate import Estimate, estimate
from complete_fn.estimates.estimate_report import report
from complete_fn.execution.summary import Summary
from complete_fn.history.run_history import past
from complete_fn.prompts.options import parse_options
from complete_fn.prompts.templates import render_column
from complete_fn.store.tables import runs
from complete_fn.types import Asker


@dataclass(frozen=True)
class Job:
    name: str
    table: str
    template: str
    options: Mapping[str, Any]
    together: bool = False  # rows that lie together in the table, instead of rows from all over it


JOBS = (
    Job("labels", "packages", "Name the section: {description}", {"max_tokens": 4}),
    Job("synopses, at most 32", "packages", "Write a one-line synopsis: {description}", {"max_tokens": 32}),
    Job("JSON, free length", "packages", "Describe as JSON: {description}", {}),
    Job(
        "edges, fields reordered",
        "dependencies",
        "Name the section: {package} {package_description} {dependency} {dependency_description}",
        {"max_tokens": 8, "reorder_fields": True},
    ),
    Job(
        "functions, fields reordered",
        "functions",
        "Write a one-line synopsis: {package} {module} {class} {signature} {documentation}",
        {"max_tokens": 16, "reorder_fields": True},
        together=True,
    ),
)


def prompts_of(table: Table, job: Job, rows: list[int]) -> Any:
    columns = {f: pa.array([table.rows[r][c] for r in rows]) for c, f in enumerate(table.fields)}
    return render_column(job.template, columns, len(rows), bool(job.options.get("reorder_fields")))


@dataclass(frozen=True)
class Pair:
    """What was said of a job, and its bill with the seconds by the clock."""

    said: Estimate
    bill: Summary
    clock: float


def measure(job: Job, table: Table, a: argparse.Namespace, home: str, tenant: str) -> Pair:
    options = parse_options({**job.options, "cache": "off"})
    step = 1 if job.together else max(1, len(table.rows) // (a.rows + a.pilot))
    chosen = list(range(0, len(table.rows), step))[: a.rows + a.pilot]
    pilot = chosen[:: 1 if a.first else max(1, len(chosen) // a.pilot)][: a.pilot]
    prompts = prompts_of(table, job, sorted(set(chosen) - set(pilot)))
    with closing(Session(home=home, who=Asker(tenant=tenant), progress=False)) as session:
        session.complete(a.model, prompts_of(table, job, pilot), options, planned=True)
        said = estimate(Call.of(session.model(a.model), options), prompts, session.store, session.who, "off")
    with closing(Session(home=home, who=Asker(tenant=f"{tenant}, bill"), progress=False)) as session:
        bill = session.complete(a.model, prompts, options, planned=True).summary
        pair = Pair(said, bill, past(session.store, a.model, session.who.tenant)[0].seconds)
    print(line(tenant, [pair]), file=sys.stderr, flush=True)
    if a.report:
        print(report(said))
    return pair


def line(name: str, pairs: list[Pair]) -> str:
    """The last pair's tokens, and the errors of all."""
    usage, said = pairs[-1].bill.usage, pairs[-1].said.likely
    devices = [p.bill.usage.device_seconds for p in pairs]
    took = statistics.median(devices)
    price = errors([p.said.price / p.bill.cost for p in pairs])
    device = errors([(p.said.seconds or 0) / seconds for p, seconds in zip(pairs, devices, strict=True)])
    clock = errors([(p.said.clock_seconds or 0) / p.clock for p in pairs])
    cached, foretold = usage.cached_tokens / usage.prompt_tokens, said.cached_tokens / said.prompt_tokens
    spread = f", bills spread {(max(devices) - min(devices)) / took:.1%}" if len(pairs) > 1 else ""
    return (
        f"{name:>27}: {pairs[-1].bill.rows:,} rows, {usage.prompt_tokens:,} tokens in ({cached:.1%} cached, "
        f"estimate {foretold:.1%}), {usage.completion_tokens:,} out (estimate {said.completion_tokens:,}); "
        f"price {price}; device-seconds {device} of {took:.1f}{spread}; by the clock {clock}"
    )


def errors(ratios: list[float]) -> str:
    low, middle, high = min(ratios) - 1, statistics.median(ratios) - 1, max(ratios) - 1
    return f"{middle:+.1%}" + (f" [{low:+.1%}, {high:+.1%}]" if len(ratios) > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--index", type=Path, default=Path(tempfile.gettempdir()) / "debian-index", help="Debian's")
    parser.add_argument("--model", default="demo-llama")
    parser.add_argument("--rows", type=int, default=1500, help="rows of each job")
    parser.add_argument("--pilot", type=int, default=300, help="rows answered before")
    parser.add_argument("--first", action="store_true", help="the pilot is the first rows, not rows from all over")
    parser.add_argument("--rounds", type=int, default=3, help="pairs of an estimate and a bill, of each job")
    parser.add_argument("--jobs", nargs="+", default=[j.name for j in JOBS], metavar="NAME")
    parser.add_argument("--report", action="store_true", help="print each estimate as the dry run does")
    a = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores; {a.model}, pilots of {a.pilot} rows")
    by_name = {t.name: t for t in tables(a.index, 20_000)}
    jobs = [j for j in JOBS if j.name in a.jobs]
    pairs: dict[str, list[Pair]] = {j.name: [] for j in jobs}
    names = [f"Name the section: package {n}" for n in range(64)]
    with tempfile.TemporaryDirectory() as home, closing(Session(home=home, progress=False)) as warm:
        for turn in range(a.rounds):
            with warm.store.write() as connection:
                connection.execute(runs.delete())
            warm.complete(a.model, names, {"max_tokens": 4, "cache": "off"})
            for job in jobs if turn % 2 == 0 else reversed(jobs):
                pairs[job.name].append(measure(job, by_name[job.table], a, home, f"{job.name}, round {turn}"))
    for name, found in pairs.items():
        print(line(name, found))


if __name__ == "__main__":
    main()
