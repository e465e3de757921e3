"""What each step saves on one real table: device-seconds and list price per 1,000 answers, with a GEMM-sized model.

The table: which source package of Debian needs which other, with both descriptions, for the packages of some sections;
several binary packages of one source need the same, so that rows repeat, as joins make them. The question has a label
as its answer.

    plain vLLM           the rows as they lie, prefix caching on, the label written out (--label-tokens)
    + merged duplicates  equal rows are asked once
    + order              rows and fields in the order that shares most (`reorder_fields`)
    + SwiftKV            half of the layers need no prompt (num_key_value_layers = half, random weights as well)
    + one-token labels   the label by log-probabilities of its first token

The model is a Llama of 180M random weights: times and tokens are real, answers are not. List prices are demo-llama's
example prices; the same for SwiftKV, so that step saves time and no list price. All steps are taken --rounds times, one
round after the other; seconds are medians.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.engines.swiftkv_speed import SIZES, config_folder, in_one_process
from benchmarks.ordering.order_tables import CELL, Table, index, text_of
from benchmarks.ordering.prefix_order import BLOCK, MODEL, ids_of
from complete_fn.engines.prices import amount
from complete_fn.engines.tokenizer import token_sizes
from complete_fn.planning.field_order import arrange_prompts
from complete_fn.types import Usage
from complete_fn_workers.demo_model.corpus import read_index, stanzas

PUBLISHED = "Snowflake's price for SwiftKV models on Cortex: -75 % (70B), -68 % (405B)"


@dataclass
class Step:
    """One step: what was asked of vLLM, and what it took for all `answers` rows, once a round."""

    name: str
    answers: int
    prompts: int
    usage: Usage
    took: list[float]

    @property
    def seconds(self) -> float:
        return statistics.median(self.took)

    @property
    def seconds_per_1000(self) -> float:
        return 1000 * self.seconds / self.answers

    @property
    def price_per_1000(self) -> float:
        return 1000 * float(amount(MODEL.prices, self.usage)) / self.answers


def needs(folder: Path, sections: list[str], rows: int) -> Table:
    """Source packages and what they need, one row for each binary package's dependency; `rows` of them, 0 for all."""
    lists = index(folder)
    packages = {p.package: p for p in read_index(lists)}
    main = {p.source: p for p in packages.values() if p.package == p.source or p.source not in packages}
    found = []
    for path in sorted(lists.glob("*_main_binary-*_Packages*")):
        for stanza in stanzas(path):
            one = packages.get(stanza["Package"])
            for part in stanza.get("Depends", "").split(", "):
                other = packages.get(part.split(" ")[0].split(":")[0])
                if one and other and one.source in main and other.source in main and one.source != other.source:
                    sides = (main[one.source], main[other.source])
                    row = tuple(x for p in sides for x in (p.source[:CELL], text_of(p)))
                    found.append((row, one.section))
    fields = ("source", "source_description", "needed", "needed_description")
    instruction = "Is what is needed a library, a language, a tool, or data? Answer with one of these words."
    chosen = [row for row, section in found if section in sections]
    random.Random(11).shuffle(chosen)  # a parallel join leaves its rows in no order
    return Table("needs", instruction, fields, chosen[: rows or None])


def texts(table: Table, merged: bool, ordered: bool) -> list[str]:
    rows = list(dict.fromkeys(table.rows)) if merged else table.rows
    prompts = Table(table.name, table.instruction, table.fields, rows).prompts()
    if not ordered:
        return [p.render() for p in prompts]
    fields, sequence = arrange_prompts(prompts, token_sizes(MODEL))
    return [prompts[r].render(fields[r].tolist()) for r in sequence.tolist()]


def started(kept: int | None, kv_gib: float, folder: Path) -> Any:
    from vllm import LLM

    config = config_folder("180m", SIZES["180m"], kept, 1, folder)
    settings: dict[str, Any] = {"max_model_len": 4096, "max_num_batched_tokens": 2048, "max_num_seqs": 32}
    settings |= {"enforce_eager": True, "load_format": "dummy", "dtype": "bfloat16", "skip_tokenizer_init": True}
    settings |= {"block_size": BLOCK, "kv_cache_memory_bytes": int(kv_gib * 2**30), "enable_prefix_caching": True}
    llm = LLM(str(config), **settings)
    ask(llm, [list(range(2, 1000))], 4)
    return llm


def ask(llm: Any, ids: list[list[int]], tokens: int) -> tuple[float, Usage]:
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    llm.reset_prefix_cache()
    began = time.perf_counter()
    done = llm.generate([{"prompt_token_ids": i} for i in ids], params, use_tqdm=False)
    seconds = time.perf_counter() - began
    prompt, cached = sum(map(len, ids)), sum(d.num_cached_tokens or 0 for d in done)
    return seconds, Usage(prompt, cached, sum(len(d.outputs[0].token_ids) for d in done))


def waterfall(table: Table, label_tokens: int, kv_gib: float, steps: dict[str, Step]) -> None:
    """One round of all steps, noted in `steps`."""

    def step(name: str, llm: Any, prompts: list[str], tokens: int) -> None:
        seconds, usage = ask(llm, ids_of(prompts), tokens)
        steps.setdefault(name, Step(name, len(table.rows), len(prompts), usage, [])).took.append(seconds)

    ordered = texts(table, True, True)
    with tempfile.TemporaryDirectory() as folder:
        plain = started(None, kv_gib, Path(folder))
        step("plain vLLM", plain, texts(table, False, False), label_tokens)
        step("+ merged duplicates", plain, texts(table, True, False), label_tokens)
        step("+ order", plain, ordered, label_tokens)
        del plain
        swift = started(SIZES["180m"].layers // 2, kv_gib, Path(folder))
        step("+ SwiftKV", swift, ordered, label_tokens)
        step("+ one-token labels", swift, ordered, 1)


def line_of(first: Step, s: Step) -> str:
    cached = s.usage.cached_tokens / s.usage.prompt_tokens
    low, high = (1000 * seconds / s.answers for seconds in (min(s.took), max(s.took)))
    return (
        f"| {s.name} | {s.prompts:,} | {s.usage.prompt_tokens:,} | {cached:.0%} | "
        f"{s.seconds_per_1000:.1f} [{low:.1f}-{high:.1f}] | {first.seconds_per_1000 / s.seconds_per_1000:.2f}x | "
        f"{s.price_per_1000:.5f} | {1 - s.price_per_1000 / first.price_per_1000:.0%} |"
    )


def draw(steps: list[Step], path: Path) -> None:
    """The steps as two bars each, device-seconds and list price, as shares of plain vLLM."""
    from PIL import Image, ImageDraw, ImageFont

    width, row, left, top = 900, 58, 230, 70
    image = Image.new("RGB", (width, top + row * len(steps) + 20), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(17)
    pen.text((20, 12), "Per 1,000 answers, as shares of plain vLLM", fill="black", font=font)
    for at, (colour, what) in enumerate((("#1f6f8b", "device-seconds"), ("#e0a030", "list price"))):
        pen.rectangle((left + 200 * at, 44, left + 200 * at + 14, 58), fill=colour)
        pen.text((left + 200 * at + 20, 40), what, fill="black", font=font)
    for number, s in enumerate(steps):
        y = top + row * number
        pen.text((20, y + 12), s.name, fill="black", font=font)
        pairs = ((s.seconds_per_1000, steps[0].seconds_per_1000), (s.price_per_1000, steps[0].price_per_1000))
        for at, (value, whole) in enumerate(pairs):
            length = (width - left - 130) * value / whole
            colour = ("#1f6f8b", "#e0a030")[at]
            pen.rectangle((left, y + 4 + 22 * at, left + length, y + 22 + 22 * at), fill=colour)
            unit = f"{value:.1f} s" if at == 0 else f"{MODEL.prices.currency} {value:.4f}"
            pen.text((left + length + 8, y + 2 + 22 * at), unit, fill="black", font=font)
    image.save(path, optimize=True)


def main() -> None:
    in_one_process()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--index", type=Path, default=Path(tempfile.gettempdir()) / "debian-index", help="Debian's")
    parser.add_argument("--sections", nargs="+", default=["database", "mail", "news"], help="of what needs something")
    parser.add_argument("--rows", type=int, default=0, help="so many of them, drawn at random; 0: all")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--label-tokens", type=int, default=4, help="tokens of a label that is written out")
    parser.add_argument("--kv-gib", type=float, default=1.0, help="KV cache: 1 GiB holds 65,536 tokens of this model")
    parser.add_argument("--picture", type=Path, help="write the picture here, as PNG")
    parser.add_argument("--json", type=Path, help="write the figures here")
    a = parser.parse_args()
    table = needs(a.index, a.sections, a.rows)
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores; 180M random weights, bfloat16, eager")
    print(f"{len(table.rows):,} rows, {len(set(table.rows)):,} distinct; KV {a.kv_gib} GiB; {MODEL.prices}")
    noted: dict[str, Step] = {}
    for number in range(a.rounds):
        waterfall(table, a.label_tokens, a.kv_gib, noted)
        print(f"round {number + 1}: {', '.join(f'{s.name} {s.took[-1]:.1f} s' for s in noted.values())}", flush=True)
    steps = list(noted.values())
    print("| step | prompts | tokens in | cached | device-s | speed-up | list price | saved |\n|---|" + "---:|" * 7)
    print("\n".join(line_of(steps[0], s) for s in steps))
    print(f"In all {steps[0].seconds / steps[-1].seconds:.2f}x. Published: {PUBLISHED}")
    if a.picture:
        draw(steps, a.picture)
    if a.json:
        a.json.write_text(json.dumps([asdict(s) for s in steps], indent=1))


if __name__ == "__main__":
    main()
