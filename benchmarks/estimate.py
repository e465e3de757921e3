"""The estimate against the bill: list price and device-seconds of five jobs, said before and measured after.

Each job first answers a pilot of its rows, as a user would who tries a query on a sample; the estimate of the other
rows then rests on the pilot's answers and on all runs before. The rest is then answered --bills times, each time for a
tenant of its own, so that it finds an empty prefix cache; the engine is warm. Errors are estimate / median bill - 1.
The bills' own spread is (largest - smallest) / median: nothing can foretell a machine better than it repeats itself.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

sys.path.insert(0, str(Path(__file__).parent))

from order_tables import Table, tables

from complete_fn import Session
from complete_fn.estimate import estimate
from complete_fn.estimate_report import report
from complete_fn.keys import Call
from complete_fn.options import parse_options
from complete_fn.prompts import render_column
from complete_fn.rates import past
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
        "functions",
        "functions",
        "Write a one-line synopsis: {class} {documentation}",
        {"max_tokens": 16},
        together=True,
    ),
)


def prompts_of(table: Table, job: Job, rows: list[int]) -> Any:
    columns = {f: pa.array([table.rows[r][c] for r in rows]) for c, f in enumerate(table.fields)}
    return render_column(job.template, columns, len(rows), bool(job.options.get("reorder_fields")))


def measure(job: Job, table: Table, a: argparse.Namespace, home: str) -> None:
    options = parse_options({**job.options, "cache": "off"})
    who = Asker(tenant=job.name)
    session = Session(home=home, who=who, progress=False)
    model = session.model(a.model)
    step = 1 if job.together else max(1, len(table.rows) // (a.rows + a.pilot))
    chosen = list(range(0, len(table.rows), step))[: a.rows + a.pilot]
    pilot = chosen[:: 1 if a.first else max(1, len(chosen) // a.pilot)][: a.pilot]
    rest = sorted(set(chosen) - set(pilot))
    session.complete(a.model, prompts_of(table, job, pilot), options, planned=True)
    prompts = prompts_of(table, job, rest)
    said = estimate(Call.of(model, options), prompts, session.store, who, "off")
    session.close()
    bills, devices, clocks = [], [], []
    for number in range(a.bills):
        session = Session(home=home, who=Asker(tenant=f"{job.name}, bill {number}"), progress=False)
        bills.append(session.complete(a.model, prompts, options, planned=True).summary)
        devices.append(bills[-1].usage.device_seconds)
        clocks.append(past(session.store, a.model, session.who.tenant)[0].seconds)
        session.close()
    bill = bills[0]
    took, clock = statistics.median(devices), statistics.median(clocks)
    spread = (max(devices) - min(devices)) / took
    share = bill.usage.cached_tokens / bill.usage.prompt_tokens
    expected = said.likely
    said_share = expected.cached_tokens / max(1, expected.prompt_tokens)
    print(
        f"{job.name:>24}: {bill.rows:,} rows, {bill.usage.prompt_tokens:,} tokens in ({share:.0%} cached, "
        f"estimate {said_share:.0%}), {bill.usage.completion_tokens:,} out "
        f"(estimate {expected.completion_tokens:,}); price {said.price:.6f} for {bill.cost:.6f} "
        f"({said.price / bill.cost - 1:+.1%}), device-seconds {said.seconds or 0:.1f} for {took:.1f} "
        f"({(said.seconds or 0) / took - 1:+.1%}; bills spread {spread:.1%}), "
        f"by the clock {said.clock_seconds or 0:.1f} for {clock:.1f} ({(said.clock_seconds or 0) / clock - 1:+.1%})",
        flush=True,
    )
    if a.report:
        print(report(said))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--index", type=Path, default=Path(tempfile.gettempdir()) / "debian-index", help="Debian's")
    parser.add_argument("--model", default="demo-llama")
    parser.add_argument("--rows", type=int, default=1500, help="rows of each job")
    parser.add_argument("--pilot", type=int, default=300, help="rows answered before")
    parser.add_argument("--first", action="store_true", help="the pilot is the first rows, not rows from all over")
    parser.add_argument("--bills", type=int, default=3, help="times that each job is run and billed")
    parser.add_argument("--jobs", nargs="+", default=[j.name for j in JOBS], metavar="NAME")
    parser.add_argument("--report", action="store_true", help="print each estimate as the dry run does")
    a = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores; {a.model}, pilots of {a.pilot} rows")
    by_name = {t.name: t for t in tables(a.index, 20_000)}
    with tempfile.TemporaryDirectory() as home:
        warm = Session(home=home, who=Asker(tenant="warm up"), progress=False)
        warm.complete(a.model, [f"Name the section: package {n}" for n in range(64)], {"max_tokens": 4, "cache": "off"})
        for job in (j for j in JOBS if j.name in a.jobs):
            measure(job, by_name[job.table], a, home)
        warm.close()


if __name__ == "__main__":
    main()
