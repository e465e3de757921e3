"""Rows/s of a REST job on one worker against `complete-fn run`, on the same rows and the same model.

    python benchmarks/callers/rest_overhead.py                    2,000 rows, 5 alternating pairs
    python benchmarks/callers/rest_overhead.py --rows 1000 --pairs 3

Service and shell each have a warm engine of their own, as their homes differ; one works at a time. The shell's time is
that of its whole process, without the start of Python (measured by a run over one row). A job's time is from its
submission until its results are fetched, upload and download included. Every run's prompts begin with a number of its
own, so that none finds the answers or prefixes of another. Goal: 0.95.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from complete_fn import Session
from complete_fn.client import Client

SAMPLE = Path(__file__).parents[2] / "sql" / "examples" / "packages.parquet"
PROMPT = "Write a one-line synopsis: {text}"
COMPLETE_FN = Path(sys.executable).with_name("complete-fn")
SERIAL = count()


@contextmanager
def service(home: Path) -> Iterator[Client]:
    command = [str(COMPLETE_FN), "serve", "--port", "0", "--home", str(home)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as serving:
        assert serving.stderr is not None
        try:
            line = next(line for line in serving.stderr if "serves http" in line)
            threading.Thread(target=lambda: [None for _ in serving.stderr or ()], daemon=True).start()
            client = Client(line.split("serves ")[1].split("/v1")[0])
            yield client
            client.close()
        finally:
            serving.terminate()


def write_rows(folder: Path, rows: int) -> Path:
    texts = list(dict.fromkeys(pq.read_table(SAMPLE).column("description").to_pylist()))
    number = next(SERIAL)
    path = folder / f"rows-{number}.parquet"
    column = [f"{number} {texts[n % len(texts)]} {n // len(texts)}" for n in range(rows)]
    pq.write_table(pa.table({"text": column}), path)
    return path


def by_rest(client: Client, model: str, path: Path, rows: int) -> float:
    began = time.perf_counter()
    job = client.submit(path, model, PROMPT, options={"max_tokens": 32})
    job.wait(progress=False)
    assert len(job.results()) == rows
    return time.perf_counter() - began


def by_shell(home: Path, model: str, path: Path) -> float:
    command = [str(COMPLETE_FN), "run", "-m", model, "-p", PROMPT, "--max-tokens", "32", "--quiet", "--home", str(home)]
    began = time.perf_counter()
    subprocess.run([*command, str(path), "-o", str(path.with_suffix(".out.parquet"))], check=True, capture_output=True)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo-llama-swiftkv")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--pairs", type=int, default=5)
    a = parser.parse_args()
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    print(f"{machine}; {a.model}, {a.rows} rows, 32 tokens out")
    with tempfile.TemporaryDirectory() as name, service(Path(name) / "service") as client:
        folder, home = Path(name), Path(name) / "shell"
        session = Session(home=home)
        session.complete(a.model, ["Name the section: it keeps the shell's engine warm"])
        by_rest(client, a.model, write_rows(folder, 64), 64)
        start = min(by_shell(home, a.model, write_rows(folder, 1)) for _ in range(3))
        print(f"start of the shell, with one row: {start:.2f} s")
        ratios = []
        for pair in range(a.pairs):
            took = {}
            for side in ("rest", "shell") if pair % 2 else ("shell", "rest"):
                path = write_rows(folder, a.rows)
                rest = side == "rest"
                took[side] = by_rest(client, a.model, path, a.rows) if rest else by_shell(home, a.model, path) - start
            ratios.append(took["shell"] / took["rest"])
            print(f"REST {a.rows / took['rest']:.1f} rows/s, shell {a.rows / took['shell']:.1f}: {ratios[-1]:.3f}")
        session.close()
    print(f"REST over shell, rows/s: {statistics.median(ratios):.3f} [{min(ratios):.3f}-{max(ratios):.3f}]")


if __name__ == "__main__":
    main()
