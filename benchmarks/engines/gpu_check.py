"""One report of SwiftKV on this machine's CUDA card: the `gpu` tests, then speed at Llama 8B and 70B widths.

    make gpu-check                                          about 10 minutes; writes gpu-check.md and gpu-check.json
    python benchmarks/engines/gpu_check.py --sizes 8b       only one size

Weights are random, so nothing is downloaded. Where the card cannot hold plain, SwiftKV and AcrossKV side by side, a
size keeps its widths and loses layers; the report names how many were measured. Please send both files in.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
HEAD = "| layers x width | mode | K | G | in | out | cached | ratio | ceiling | of it | TTFT | TPOT |"


def card() -> str:
    """Name, memory and driver of every card, as nvidia-smi tells them.

    Raises:
        SystemExit: there is no CUDA card that torch can use.
    """
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("No CUDA card can be used here (torch.cuda.is_available() is false): nothing to check.")
    wanted = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    return subprocess.run(wanted, capture_output=True, text=True, check=True).stdout.strip()


def gpu_tests() -> tuple[bool, str]:
    """Whether all passed, and pytest's last lines."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/gpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.returncode == 0, "\n".join((done.stdout + done.stderr).strip().splitlines()[-15:])


def speed(a: argparse.Namespace, into: Path) -> dict[str, Any]:
    script = str(ROOT / "benchmarks" / "engines" / "swiftkv_speed.py")
    options = ["--sizes", *a.sizes, "--quick", "--modes", *a.modes, "--prompts", str(a.prompts), "--fit", "--ungated"]
    options += ["--tensor-parallel-size", str(a.tensor_parallel_size), "--max-num-batched-tokens", "8192"]
    subprocess.run([sys.executable, script, *options, "--json", str(into)], check=True)
    found: dict[str, Any] = json.loads(into.read_text())
    return found


def line_of(row: dict[str, Any]) -> str:
    tpot = f"{row['tpot_ratio']:.2f}x" if row["tpot_ratio"] else "-"
    return (
        f"| {row['num_hidden_layers']} x {row['d']} ({row['size']}) | {row['mode']} | {row['num_key_value_layers']} "
        f"| {row['key_value_group_size']} | {row['input_tokens']} | {row['output_tokens']} | {row['cached_tokens']} "
        f"| {row['ratio']:.2f}x | {row['ceiling']:.2f} | {row['of_ceiling']:.0%} | {row['ttft_ratio']:.2f}x | {tpot} |"
    )


def report(cards: str, passed: bool, tests: str, found: dict[str, Any], seconds: float) -> str:
    table = [HEAD, "|" + "---|" * 12, *map(line_of, found["rows"])]
    return "\n".join(
        [
            f"# SwiftKV on {cards.splitlines()[0]}\n",
            f"Cards: {'; '.join(cards.splitlines())}. {json.dumps(found['setting'])}. {seconds / 60:.0f} minutes.",
            "Random weights, bfloat16; ratio = plain / SwiftKV, median of alternating runs.\n",
            f"Tests: {'passed' if passed else 'FAILED'}\n\n```text\n{tests}\n```\n",
            *table,
            "",
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["8b", "70b"])
    parser.add_argument("--modes", nargs="+", default=["compiled"], choices=["eager", "compiled"])
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("gpu-check"), help="the report's path without its ending")
    a = parser.parse_args()
    began, cards = time.monotonic(), card()
    passed, tests = gpu_tests()
    found = speed(a, a.out.with_suffix(".json"))
    text = report(cards, passed, tests, found, time.monotonic() - began)
    a.out.with_suffix(".md").write_text(text)
    print(text)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
