"""complete() against what else runs vLLM over rows: same rows, same vLLM build, model and settings, taking turns.

    python benchmarks/callers/peers.py --only generate run-batch      plain vLLM, in the project's own environment
    python benchmarks/callers/peers.py --only ray daft                in .cache/peers/, which the script makes at first

Peers: `generate` is `vllm.LLM.generate` in input order; `run-batch` the code of `vllm run-batch` (its files are written
and read inside the time, its engine is started once); `ray` is Ray Data LLM; `daft` its `vllm-prefix-caching` provider.
The last two start an engine for every dataset: the time of a one-row dataset, start-up above all, is taken off.
Every run has prefixes of its own (a salt, or an engine just started), so none profits from another's cache.
Each peer is measured against ours in alternating pairs; ratio = our seconds / theirs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "sql/examples/packages.parquet"
PEERS = ROOT / ".cache/peers"
LIBRARIES = {"ray": "ray[data,serve]==2.60.0", "daft": "daft==0.7.26"}
MAX_TOKENS = 16
STARTED: list[Any] = []  # an engine whose context is collected shuts down


def workloads(rows: int) -> dict[str, list[str]]:
    """Prompts in input order: an instruction and a text of its own; several columns that repeat; 30 % duplicates."""
    import pyarrow.parquet as pq

    table = pq.read_table(SAMPLE).to_pylist()
    distinct = list({row["description"]: row for row in table}.values())
    draw = random.Random(3)
    draw.shuffle(distinct)
    chosen = distinct[:rows]
    columns = "Maintainer: {maintainer}\nSource: {source}\nSection: {section}\nSynopsis: {synopsis}\n"
    some = [row["description"] for row in chosen[: round(rows * 0.7)]]
    repeated = some + [draw.choice(some) for _ in range(len(chosen) - len(some))]
    draw.shuffle(repeated)
    return {
        "shared instruction": [f"Write a one-line synopsis: {row['description']}" for row in chosen],
        "several columns": [f"Name the section: {columns.format(**row)}{row['description'][:200]}" for row in chosen],
        "30 % duplicates": [f"Write a one-line synopsis: {text}" for text in repeated],
    }


# -- the peers, each in a process of its own: {"prompts", "salt"} a line in, {"seconds", "answers"} a line out -------


def generate(setting: dict[str, Any]) -> Callable[[list[str], str], int]:
    from vllm import LLM, SamplingParams

    llm = LLM(**setting)
    tokenizer = llm.get_tokenizer()
    params = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS)

    def run(prompts: list[str], salt: str) -> int:
        asked: Any = [{"prompt": t, "cache_salt": salt} for t in as_chats(tokenizer, prompts)]
        return len(llm.generate(asked, params, use_tqdm=False))

    return run


def as_chats(tokenizer: Any, prompts: list[str]) -> list[str]:
    turns = ([{"role": "user", "content": p}] for p in prompts)
    return [tokenizer.apply_chat_template(t, tokenize=False, add_generation_prompt=True) for t in turns]


def run_batch(setting: dict[str, Any]) -> Callable[[list[str], str], int]:
    import asyncio

    from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client
    from vllm.entrypoints.launchers.run_batch import make_arg_parser
    from vllm.entrypoints.launchers.run_batch import run_batch as vllm_run_batch
    from vllm.usage.usage_lib import UsageContext
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    folder = Path(tempfile.mkdtemp())
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(
        ["-i", str(folder / "in.jsonl"), "-o", str(folder / "out.jsonl"), "--model", setting["model"]]
    )
    for name, value in setting.items():
        setattr(args, name, value)
    loop = asyncio.new_event_loop()
    STARTED.append(build_async_engine_client(args, usage_context=UsageContext.OPENAI_BATCH_RUNNER))
    client = loop.run_until_complete(STARTED[-1].__aenter__())

    def line(number: int, prompt: str, salt: str) -> str:
        messages = [{"role": "user", "content": prompt}]
        body = {"model": setting["model"], "messages": messages, "temperature": 0.0, "max_tokens": MAX_TOKENS}
        asked = {"custom_id": str(number), "method": "POST", "url": "/v1/chat/completions"}
        return json.dumps(asked | {"body": body | {"cache_salt": salt}})

    def run(prompts: list[str], salt: str) -> int:
        Path(args.input_file).write_text("\n".join(line(n, p, salt) for n, p in enumerate(prompts)))
        loop.run_until_complete(vllm_run_batch(client, args))
        answers = [json.loads(text) for text in Path(args.output_file).read_text().splitlines()]
        return sum(a["error"] is None for a in answers)

    return run


def ray(setting: dict[str, Any]) -> Callable[[list[str], str], int]:
    import ray as library
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    library.init(num_gpus=1, include_dashboard=False, log_to_driver=False)  # a logical GPU, or nothing is placed
    engine = {k: v for k, v in setting.items() if k != "model"}
    config = vLLMEngineProcessorConfig(model_source=setting["model"], engine_kwargs=engine, batch_size=64)

    def ask(row: dict[str, Any]) -> dict[str, Any]:
        sampling = {"temperature": 0.0, "max_tokens": MAX_TOKENS}
        return {"messages": [{"role": "user", "content": row["prompt"]}], "sampling_params": sampling}

    processor = build_processor(config, preprocess=ask, postprocess=lambda row: {"answer": row["generated_text"]})

    def run(prompts: list[str], salt: str) -> int:
        return len(processor(library.data.from_items([{"prompt": p} for p in prompts])).take_all())

    return run


def daft(setting: dict[str, Any]) -> Callable[[list[str], str], int]:
    import daft as library
    from daft.functions import prompt
    from transformers import AutoTokenizer
    from vllm import SamplingParams

    engine = {k: v for k, v in setting.items() if k != "model"}
    tokenizer = AutoTokenizer.from_pretrained(setting["model"])
    params = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS)

    def run(prompts: list[str], salt: str) -> int:
        asked = prompt(
            library.col("prompt"),
            provider="vllm-prefix-caching",
            model=setting["model"],
            engine_args=engine,
            generate_args={"sampling_params": params},  # another argument fails each row unseen, and it waits for ever
            gpus_per_actor=0,
        )
        rows = library.from_pydict({"prompt": as_chats(tokenizer, prompts)})
        return len(rows.select(asked.alias("answer")).to_pydict()["answer"])

    return run


SIDES = {"generate": generate, "run-batch": run_batch, "ray": ray, "daft": daft}
SHORT_LIVED = ("ray", "daft")


def serve(side: str) -> None:
    """Be one of the peers."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the libraries' own words go to stderr
    run = SIDES[side](json.loads(sys.stdin.readline()))
    print("{}", file=out, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        began = time.perf_counter()
        answers = run(asked["prompts"], asked["salt"])
        print(json.dumps({"seconds": time.perf_counter() - began, "answers": answers}), file=out, flush=True)


class Peer:
    """One of the peers, running; `start_up` seconds are taken off each of its runs."""

    def __init__(self, side: str, setting: dict[str, Any], log: Path) -> None:
        from complete_fn_workers.engine.allocator import allocator_environment

        self.side, self.log, self.start_up = side, log, 0.0
        environment = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR", "RAY_DEDUP_LOGS": "0"}
        environment["VLLM_CPU_NUM_OF_RESERVED_CPU"] = "0"  # all cores, as our engine has
        if side == "generate":
            environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        environment |= allocator_environment(environment)
        python = str(environment_of_peers(side)) if side in SHORT_LIVED else sys.executable
        self.child = subprocess.Popen(
            [python, __file__, "--serve", side],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            text=True,
            env=environment,
        )
        self.ask(setting)
        first = self.run(["Name the section: warm up"], "warm")
        if side in SHORT_LIVED:
            self.start_up = first

    def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        send: IO[str] = self.child.stdin  # type: ignore[assignment]
        receive: IO[str] = self.child.stdout  # type: ignore[assignment]
        send.write(json.dumps(message) + "\n")
        send.flush()
        line = receive.readline()
        if not line:
            raise SystemExit(f"{self.side} ended:\n{self.log.read_text()[-3000:]}")
        found: dict[str, Any] = json.loads(line)
        return found

    def run(self, prompts: list[str], salt: str) -> float:
        found = self.ask({"prompts": prompts, "salt": salt})
        if found["answers"] != len(prompts):
            raise SystemExit(f"{self.side} answered {found['answers']} of {len(prompts)} rows: see {self.log}")
        return float(found["seconds"]) - self.start_up

    def end(self) -> None:
        self.child.stdin.close()  # type: ignore[union-attr]
        self.child.wait()


def environment_of_peers(side: str) -> Path:
    """The Python of .cache/peers, with the library in it and, behind its own, this environment's vLLM."""
    python = PEERS / "bin/python"
    if not python.exists():
        venv.create(PEERS, with_pip=True)
        own = next(PEERS.glob("lib/python*/site-packages"))
        (own / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
    if subprocess.run([python, "-c", f"import {side}"], capture_output=True).returncode:
        subprocess.run([python, "-m", "pip", "install", "-q", LIBRARIES[side]], check=True)
    return python


def ours(model: str, prompts: list[str], salt: str, home: str) -> float:
    import duckdb
    import pyarrow as pa

    from complete_fn.types import Asker
    from complete_fn_connectors.duckdb import register

    with duckdb.connect() as con, register(con, home=home, progress=False) as registered:
        registered.session.who = Asker(tenant=salt)
        con.register("docs", pa.table({"prompt": prompts}))
        query = f"SELECT complete('{model}', prompt, {{'max_tokens': {MAX_TOKENS}, 'cache': 'off'}}) FROM docs"
        began = time.perf_counter()
        rows = con.execute(query).fetchall()
        seconds = time.perf_counter() - began
    if sum(row[0] is not None for row in rows) != len(prompts):
        raise SystemExit("complete() left rows unanswered.")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(SIDES), default=["generate", "run-batch"])
    parser.add_argument("--model", default="demo-llama", help="a catalogue name with a local folder")
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--serve", choices=list(SIDES), help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.serve:
        serve(a.serve)
        return
    from complete_fn.engines.catalogue import find_model
    from complete_fn_workers.engine.machine import computes_bfloat16

    model = find_model(a.model)
    setting = {
        "model": str(model.local_folder),
        "max_model_len": model.max_model_len,
        "enable_prefix_caching": True,
        "kv_cache_memory_bytes": 1 << 30,
        "seed": 0,
        **({} if computes_bfloat16() else {"dtype": "float32"}),  # as our engine chooses
        **model.engine_args,
    }
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores; {a.model}, {setting}")
    print(f"{a.rows} rows, max_tokens {MAX_TOKENS}, {a.pairs} pairs, start-up excluded")
    with tempfile.TemporaryDirectory() as home:
        ours(a.model, ["warm up"], "warm", home)
        for side in a.only:
            peer = Peer(side, setting, Path(home) / f"{side}.log")
            for name, prompts in workloads(a.rows).items():
                print(compare(peer, name, prompts, a.model, a.pairs, home), flush=True)
            peer.end()


def compare(peer: Peer, name: str, prompts: list[str], model: str, pairs: int, home: str) -> str:
    took: dict[str, list[float]] = {"ours": [], peer.side: []}
    for pair in range(pairs):
        salt = f"{peer.side}-{name}-{pair}"
        sides = {
            "ours": lambda salt=salt: ours(model, prompts, salt, home),
            peer.side: lambda salt=salt: peer.run(prompts, salt),
        }
        for side in list(sides) if pair % 2 else list(sides)[::-1]:
            took[side].append(sides[side]())
    ratios = [mine / theirs for mine, theirs in zip(took["ours"], took[peer.side], strict=True)]
    seconds = f"ours {statistics.median(took['ours']):.1f} s, theirs {statistics.median(took[peer.side]):.1f} s"
    spread = f"{statistics.median(ratios):.3f} [{min(ratios):.3f}-{max(ratios):.3f}]"
    return f"{peer.side:>10} {name:>20}: {seconds}, ratio {spread}"


if __name__ == "__main__":
    main()
