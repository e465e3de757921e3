"""Two calls of one query through one engine: at the same time, against one after the other.

    python benchmarks/callers/together.py                         1,500 rows, 5 alternating pairs

The query asks two things of each row: its section as one of some labels (long prompts, one token), and a text of up to
32 tokens. Every run's prompts begin with a number of its own. The engine is warm. Ratio = together / in turn, in time.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from itertools import count
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from complete_fn import Session
from complete_fn_connectors import concurrent_runs as together
from complete_fn_connectors.concurrent_runs import WantedRun, complete_together

SAMPLE = Path(__file__).parents[2] / "sql" / "examples" / "packages.parquet"
LABELS = ["libdevel", "python", "doc", "net", "admin", "utils", "science", "games"]
SERIAL = count(1)


def asked(model: str, texts: list[str]) -> list[WantedRun]:
    number = next(SERIAL)
    labels = [f"{number} Name the section: {text}" for text in texts]
    synopses = [f"{number} Write a one-line synopsis: {text}" for text in texts]
    columns = [pa.array(prompts, pa.large_string()) for prompts in (labels, synopses)]
    return [WantedRun(model, columns[0], {"choices": LABELS}), WantedRun(model, columns[1], {"max_tokens": 32})]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo-llama")
    parser.add_argument("--rows", type=int, default=1500)
    parser.add_argument("--pairs", type=int, default=5)
    a = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores; {a.model}, {a.rows} rows")
    texts = list(dict.fromkeys(pq.read_table(SAMPLE).column("description").to_pylist()))[: a.rows]
    ratios, most = [], together.AT_ONCE
    with tempfile.TemporaryDirectory() as home:
        session = Session(home=home, progress=False)
        complete_together(session, asked(a.model, texts[:200]))
        for pair in range(a.pairs):
            took = {}
            for at_once in (1, most) if pair % 2 == 0 else (most, 1):
                together.AT_ONCE = at_once
                wanted = asked(a.model, texts)
                began = time.perf_counter()
                complete_together(session, wanted)
                took[at_once] = time.perf_counter() - began
            ratios.append(took[most] / took[1])
            print(f"together {took[most]:.2f} s, in turn {took[1]:.2f} s: {ratios[-1]:.3f}", flush=True)
        session.close()
    print(f"together / in turn: {statistics.median(ratios):.3f} [{min(ratios):.3f}-{max(ratios):.3f}]")


if __name__ == "__main__":
    main()
