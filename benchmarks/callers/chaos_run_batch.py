"""What `vllm run-batch` keeps of a job under the faults of tests/acceptance/test_chaos.py, thrown on the same schedule.

    python benchmarks/callers/chaos_run_batch.py --minutes 10

Rows and model are the long test's. First a quiet run; then, for --minutes at most, a run that is started again whenever
it dies. Of the eight kinds of fault, those that exist here: a kill -9 of the process ("worker killed", "API killed":
for run-batch one and the same) or of its engine. It counts rows in the output file, and rows that were answered by the
engine and thrown away, as the progress bar showed them before each kill (it moves every 5 s, so that is a lower bound).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.acceptance.chaos import SEED, schedule
from tests.acceptance.test_chaos import LONG_PAUSES, LONG_ROWS, texts
from tests.conftest import write_tiny_llama

OF_THE_PROCESS, OF_THE_ENGINE = ("worker killed", "API killed"), "engine killed"
SETTING = {"max-model-len": 200, "max-num-seqs": 16, "max-num-batched-tokens": 1024, "kv-cache-memory-bytes": 1 << 28}
LOOK_SECONDS = 0.5


@dataclass
class Batch:
    """A job of `vllm run-batch` in `folder`; `thrown_away` counts answers that no output file has."""

    folder: Path
    model: Path
    rows: int
    thrown_away: int = 0
    starts: int = 0
    child: subprocess.Popen[bytes] | None = field(default=None)

    @property
    def output(self) -> Path:
        return self.folder / "out.jsonl"

    @property
    def log(self) -> Path:
        return self.folder / f"{self.starts}.log"

    def start(self) -> None:
        from complete_fn_workers.engine.allocator import allocator_environment

        self.starts += 1
        files = ["-i", str(self.folder / "in.jsonl"), "-o", str(self.output), "--model", str(self.model)]
        options = [word for name, value in SETTING.items() for word in (f"--{name}", str(value))]
        command = [sys.executable, "-m", "vllm.entrypoints.launchers.run_batch", *files, *options]
        environment = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR"}
        with self.log.open("wb") as log:
            self.child = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment | allocator_environment(environment)
            )

    def answered(self) -> int:
        """Requests the engine has answered in this start."""
        found = re.findall(rf"(\d+)/{self.rows}\b", self.log.read_text(errors="replace"))
        return int(found[-1]) if found else 0

    def kill(self, engine: bool) -> None:
        assert self.child is not None
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(self.child.pid)
            below = process.children(recursive=True)
            for victim in below[:1] if engine else [process, *below]:
                victim.send_signal(signal.SIGKILL)

    def written(self) -> int:
        """Rows with an answer or an error of their own in the output file."""
        # Only \n ends a line: answers may hold U+2028 and its like.
        return sum(map(bool, self.output.read_bytes().split(b"\n"))) if self.output.exists() else 0


def write_input(folder: Path, model: Path, rows: int) -> None:
    def line(number: int, text: str) -> str:
        messages = [{"role": "user", "content": text}]
        body = {"model": str(model), "messages": messages, "temperature": 0, "max_tokens": 32}
        return json.dumps({"custom_id": str(number), "method": "POST", "url": "/v1/chat/completions", "body": body})

    (folder / "in.jsonl").write_text("\n".join(line(n, text) for n, text in enumerate(texts(rows))))


def run(batch: Batch, seconds: float, pauses: tuple[float, float] | None) -> tuple[float, dict[str, int]]:
    """Run it to its end, or for so long; (seconds, faults thrown by kind)."""
    choose, thrown = random.Random(SEED), dict.fromkeys((*OF_THE_PROCESS, OF_THE_ENGINE), 0)
    faults = schedule(pauses, choose) if pauses else None
    began = time.monotonic()
    pause, fault = next(faults) if faults else (float("inf"), "")
    due = began + pause
    batch.start()
    while time.monotonic() - began < seconds:
        time.sleep(LOOK_SECONDS)
        assert batch.child is not None
        if batch.child.poll() is not None:
            if batch.written():
                break
            batch.thrown_away += batch.answered()
            if pauses is None:
                raise SystemExit(f"run-batch ended without faults:\n{batch.log.read_text()[-2000:]}")
            batch.start()
        if faults and time.monotonic() >= due:
            if fault in thrown:
                thrown[fault] += 1
                batch.kill(engine=fault == OF_THE_ENGINE)
            pause, fault = next(faults)
            due += pause
    took = time.monotonic() - began
    if not batch.written():
        batch.thrown_away += batch.answered()
    batch.kill(engine=False)
    assert batch.child is not None
    batch.child.wait()
    return took, thrown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=LONG_ROWS)
    parser.add_argument("--minutes", type=float, default=15, help="of the run under faults, at most")
    parser.add_argument("--pauses", type=float, nargs=2, default=LONG_PAUSES, metavar="SECONDS", help="from, to")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        model = write_tiny_llama(Path(home) / "tiny")
        for name, seconds, pauses in (("quiet", 3600.0, None), ("under faults", 60 * a.minutes, tuple(a.pauses))):
            folder = Path(home) / name
            folder.mkdir()
            write_input(folder, model, a.rows)
            batch = Batch(folder, model, a.rows)
            took, thrown = run(batch, seconds, pauses)
            print(
                f"{name}: {took:.0f} s, {batch.starts} starts, faults {thrown}; {batch.written():,} of {a.rows:,} rows "
                f"written, at least {batch.thrown_away:,} answers computed and lost",
                flush=True,
            )


if __name__ == "__main__":
    main()
