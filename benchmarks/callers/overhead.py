"""complete() through DuckDB against plain `vllm.LLM.generate`: same rows, same engine settings, alternating runs.

Both engines are started once and warmed; each run uses a cache salt of its own, so that no run profits from another's
prefix cache. Plain gets its prompts already rendered, in the table's order. Ours runs with cache='off': answers are
neither known nor kept. Ratio = our seconds / plain seconds, pair by pair.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from complete_fn.engines.catalogue import Model, find_model
from complete_fn.types import Asker
from complete_fn_connectors.duckdb import register
from complete_fn_workers.engine.allocator import allocator_environment
from complete_fn_workers.engine.machine import computes_bfloat16

SAMPLE = Path(__file__).parents[2] / "sql" / "examples" / "packages.parquet"
INSTRUCTION = "Write a one-line synopsis: "
MAX_TOKENS = 32


def tables(rows: int) -> dict[str, list[str]]:
    """Descriptions without repeats; the sample as it is; 30 % duplicates, spread at random places."""
    import random

    sample = pq.read_table(SAMPLE).column("description").to_pylist()[:rows]
    distinct = list(dict.fromkeys(sample))
    pick = random.Random(3)
    repeated = distinct[: int(len(distinct) * 0.7)]
    repeated += [pick.choice(repeated) for _ in range(len(distinct) - len(repeated))]
    pick.shuffle(repeated)
    shuffled = list(distinct)
    pick.shuffle(shuffled)
    return {"no repeats": shuffled, "the sample as it is": sample, "30 % duplicates": repeated}


def plain_side() -> None:
    """The other process: reads one JSON request a line, answers with seconds and counts."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM's own words go to stderr
    setting = json.loads(sys.stdin.readline())
    from vllm import LLM, SamplingParams

    llm = LLM(**setting)
    tokenizer = llm.get_tokenizer()
    print(json.dumps({"ready": True}), file=out, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        turns = [[{"role": "user", "content": p}] for p in asked["prompts"]]
        texts = [tokenizer.apply_chat_template(t, tokenize=False, add_generation_prompt=True) for t in turns]
        tokens = [tokenizer.encode(t, add_special_tokens=False) for t in texts[:1]]
        prompts = [{"prompt": t, "cache_salt": asked["salt"]} for t in texts]
        params = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS)
        began = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - began
        found = {
            "seconds": seconds,
            "prompt": sum(len(o.prompt_token_ids) for o in outputs),
            "cached": sum(o.num_cached_tokens or 0 for o in outputs),
            "output": sum(len(o.outputs[0].token_ids) for o in outputs),
            "first": len(tokens[0]),
        }
        print(json.dumps(found), file=out, flush=True)


def start_plain(model: Model) -> subprocess.Popen[str]:
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
    environment |= allocator_environment(environment)
    child = subprocess.Popen(
        [sys.executable, __file__, "--plain-side"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
    )
    setting = {
        "model": str(model.local_folder or model.checkpoint),
        "max_model_len": model.max_model_len,
        "enable_prefix_caching": True,
        "kv_cache_memory_bytes": 1 << 30,
        "seed": 0,
        **({} if computes_bfloat16() else {"dtype": "float32"}),  # as our engine chooses
        **model.engine_args,
    }
    ask(child, setting)
    return child


def ask(child: subprocess.Popen[str], message: dict[str, Any]) -> dict[str, Any]:
    assert child.stdin is not None
    assert child.stdout is not None
    send: IO[str] = child.stdin
    send.write(json.dumps(message) + "\n")
    send.flush()
    line = child.stdout.readline()
    if not line:
        raise SystemExit("The plain side ended; run `overhead.py --plain-side` by hand to see why.")
    found: dict[str, Any] = json.loads(line)
    return found


def ours(model: str, prompts: list[str], salt: str, home: str) -> dict[str, Any]:
    con = duckdb.connect()
    registered = register(con, home=home, progress=False)
    registered.session.who = Asker(tenant=salt)
    con.register("docs", pa.table({"row": range(len(prompts)), "prompt": prompts}))
    query = f"SELECT complete_details('{model}', prompt, {{'max_tokens': {MAX_TOKENS}, 'cache': 'off'}}) d FROM docs"
    began = time.perf_counter()
    rows = con.sql(query).fetchall()
    seconds = time.perf_counter() - began
    summary = registered.session.summary
    assert len(rows) == len(prompts)
    con.close()
    return {"seconds": seconds, "distinct": summary.distinct, "cached": summary.usage.cached_tokens}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo-llama")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--plain-side", action="store_true", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.plain_side:
        plain_side()
        return
    model = find_model(a.model)
    plain = start_plain(model)
    machine = platform.processor() or platform.machine()
    print(f"{machine}, {os.cpu_count()} cores; {a.model}, engine_args {dict(model.engine_args)}")
    print(f"instruction {INSTRUCTION!r}, max_tokens {MAX_TOKENS}, {a.pairs} pairs, start-up excluded")
    with tempfile.TemporaryDirectory() as home:
        ours(a.model, ["warm up"], "warm", home)
        for name, texts in tables(a.rows).items():
            prompts = [INSTRUCTION + t for t in texts]
            measure(name, a.model, prompts, a.pairs, plain, home)
    plain.stdin.close()  # type: ignore[union-attr]
    plain.wait()


def measure(name: str, model: str, prompts: list[str], pairs: int, plain: subprocess.Popen[str], home: str) -> None:
    found = []
    for pair in range(pairs):
        salt = f"{name}-{pair}"
        sides = {
            "plain": lambda salt=salt: ask(plain, {"prompts": prompts, "salt": salt}),
            "ours": lambda salt=salt: ours(model, prompts, salt, home),
        }
        order = ("plain", "ours") if pair % 2 == 0 else ("ours", "plain")
        found.append({side: sides[side]() for side in order})
    ratios = [f["ours"]["seconds"] / f["plain"]["seconds"] for f in found]
    p, o = found[-1]["plain"], found[-1]["ours"]
    rate = statistics.median(len(prompts) / f["ours"]["seconds"] for f in found)
    print(
        f"{name:>20}: {len(prompts)} rows, {o['distinct']} distinct, {p['prompt']} tokens in, {p['output']} out; "
        f"ours {rate:.0f} rows/s, {o['cached']} cached; plain {p['cached']} cached; "
        f"time ratio {statistics.median(ratios):.3f} [{min(ratios):.3f}-{max(ratios):.3f}]"
    )


if __name__ == "__main__":
    main()
