"""What the order of rows and fields is worth: characters, tokens and blocks that a prefix cache gives back.

    python benchmarks/ordering/prefix_order.py      hit rates of three tables of 20,000 rows
    python benchmarks/ordering/prefix_order.py --timed 3000 -t packages
                                                    and job times with a Llama of 180M random weights

Orders: the table's own; sorted, with the fields in the template's order; the best order that all rows have alike, found
by trying every one; and one order a row, as `reorder_fields` plans it. Characters and tokens are those a prompt shares
with the one before it. Hits are simulated as vLLM counts them: whole blocks with the same tokens before them, in a
cache of --kv-tokens with the least recently used block leaving first. `order_bound.py` says what no order can exceed.
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import statistics
import sys
import tempfile
import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.engines.swiftkv_speed import SIZES, config_folder, flops, in_one_process
from benchmarks.ordering.order_bound import most_by_sides, most_hits, whole_fields
from benchmarks.ordering.order_tables import Table, tables
from complete_fn.engines.catalogue import find_model
from complete_fn.engines.tokenizer import ids_with, token_sizes, tokenizer_file
from complete_fn.planning import field_order
from complete_fn.planning.field_order import arrange_prompts, cells_of, common
from complete_fn.planning.field_search import Cells, Ints, expected_hits, row_order
from complete_fn.planning.prefix_tree import common_tokens, hits
from complete_fn.prompts.fields import FieldPrompt

MODEL = find_model("demo-llama")  # for its tokenizer
BLOCK = 32
ORDERS = ("input", "sorted", "best fixed", "per row")


@dataclass(frozen=True)
class Shares:
    """Of all characters or tokens, the share that comes from before."""

    characters: float
    tokens: float
    hits: float


def ids_of(texts: list[str]) -> list[list[int]]:
    file = tokenizer_file(MODEL)
    assert file is not None
    return ids_with(file, texts)


def shares(texts: list[str], ids: list[list[int]], kv_tokens: int) -> Shares:
    raw = [t.encode() for t in texts]
    characters = sum(common(a, b) for a, b in itertools.pairwise(raw)) / sum(map(len, raw))
    total = sum(map(len, ids))
    tokens = sum(common_tokens(a, b) for a, b in itertools.pairwise(ids)) / total
    return Shares(characters, tokens, sum(cached(ids, kv_tokens)) / total)


def cached(ids: list[list[int]], kv_tokens: int) -> Iterator[int]:
    """Tokens of each prompt that vLLM's prefix cache gives back."""
    blocks: OrderedDict[int, None] = OrderedDict()
    for tokens in ids:
        found, at = 0, 0
        for low in range(0, len(tokens) - BLOCK + 1, BLOCK):
            at = hash((at, *tokens[low : low + BLOCK]))
            if at in blocks:
                blocks.move_to_end(at)
                found += BLOCK if found == low else 0
            else:
                blocks[at] = None
        while len(blocks) > kv_tokens // BLOCK:
            blocks.popitem(last=False)
        yield hits(found, len(tokens), BLOCK)


def best_fixed(prompts: list[FieldPrompt]) -> list[str]:
    """The texts in the best of all orders of the fields: by equal cells, then by tokens among the best five."""
    cells = cells_of(prompts, token_sizes(MODEL))
    n, m = cells.codes.shape
    worth = {}
    for order in itertools.permutations(range(m)):
        orders = np.tile(np.array(order, np.int64), (n, 1))
        worth[order] = expected_hits(cells, orders, row_order(cells, orders))
    best: tuple[int, list[str]] = (-1, [])
    for order in sorted(worth, key=lambda o: -worth[o])[:5]:
        texts = sorted(p.render(order) for p in prompts)
        ids = ids_of(texts)
        found = sum(hits(common_tokens(a, b), len(b), BLOCK) for a, b in itertools.pairwise(ids))
        best = max(best, (found, texts))
    return best[1]


def ordered(table: Table) -> tuple[dict[str, list[str]], Ints, float]:
    """The texts in each order; of the last, each row's order of the fields and the seconds of planning."""
    prompts = table.prompts()
    began = time.perf_counter()
    chosen, rows = arrange_prompts(prompts, token_sizes(MODEL))
    seconds = time.perf_counter() - began
    per_row = [prompts[r].render(chosen[r].tolist()) for r in rows.tolist()]
    plain = [p.render() for p in prompts]
    return dict(zip(ORDERS, (plain, sorted(plain), best_fixed(prompts), per_row), strict=True)), chosen, seconds


def reachable(table: Table, chosen: Ints) -> Iterator[str]:
    """What the best orders there are could give, against the `chosen` ones, as the planner counts tokens."""
    cells = cells_of(table.prompts(), token_sizes(MODEL))
    fixed = field_order.best_fixed(cells)

    def found(of: Cells, orders: Ints) -> int:
        return expected_hits(of, orders, row_order(of, orders))

    least = found(cells, fixed)
    yield (
        f"as the planner counts tokens {found(cells, chosen) / least:.3f}x; "
        f"no order of rows and fields has more than {most_hits(cells) / least:.3f}x"
    )
    if table.sides:
        whole = whole_fields(cells)
        least, most = found(whole, fixed), most_by_sides(cells, table.sides)
        yield (
            f"in whole fields {found(whole, chosen) / least:.3f}x; "
            f"the optimum is {most / least:.3f}x, of which {found(whole, chosen) / most:.1%} is found"
        )


def job_times(texts: dict[str, list[str]], rounds: int, kv_gib: float) -> dict[str, tuple[float, int]]:
    """(median seconds, cached tokens by vLLM's own count) of answering all prompts with one token, by order."""
    from vllm import LLM, SamplingParams

    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, detokenize=False)
    ids = {name: ids_of(prompts) for name, prompts in texts.items()}
    found: dict[str, list[tuple[float, int]]] = {name: [] for name in texts}
    with tempfile.TemporaryDirectory() as folder:
        config = config_folder("180m", SIZES["180m"], None, 1, Path(folder))
        settings: dict[str, Any] = {"max_model_len": 4096, "max_num_batched_tokens": 2048, "max_num_seqs": 64}
        settings |= {"enforce_eager": True, "load_format": "dummy", "dtype": "bfloat16", "skip_tokenizer_init": True}
        settings |= {"block_size": BLOCK, "kv_cache_memory_bytes": int(kv_gib * 2**30), "enable_prefix_caching": True}
        llm = LLM(str(config), **settings)
        llm.generate([{"prompt_token_ids": list(range(2, 1500))}], params, use_tqdm=False)
        for turn in range(rounds):
            for name in list(texts) if turn % 2 == 0 else list(reversed(texts)):
                llm.reset_prefix_cache()
                began = time.perf_counter()
                done = llm.generate([{"prompt_token_ids": i} for i in ids[name]], params, use_tqdm=False)
                found[name].append((time.perf_counter() - began, sum(d.num_cached_tokens or 0 for d in done)))
    return {name: (statistics.median(s for s, _ in runs), runs[-1][1]) for name, runs in found.items()}


def work(ids: list[list[int]], cached_tokens: list[int]) -> float:
    """FLOPs of the prompts with what the cache gives back."""
    size = SIZES["180m"]
    return sum(flops(size, len(i), 1, c, size.layers, 1) for i, c in zip(ids, cached_tokens, strict=True))


def report_times(table: Table, a: argparse.Namespace, kv_tokens: int) -> None:
    texts, _, planning = ordered(table)
    texts.pop("sorted")
    times = job_times(texts, a.rounds, a.kv_gib)
    flop = {name: work(i, list(cached(i, kv_tokens))) for name, i in ((n, ids_of(t)) for n, t in texts.items())}
    slowest = times["input"][0]
    for name, (seconds, found) in times.items():
        allowed = slowest * flop[name] / flop["input"]
        total = sum(map(len, ids_of(texts[name])))
        print(
            f"  {name:>10}: {seconds:7.1f} s, {found:,} of {total:,} tokens cached by vLLM's count "
            f"({found / total:.1%}), {allowed / seconds:.2f} of what the FLOPs saved allow"
        )
    ratio = times["best fixed"][0] / times["per row"][0]
    print(f"  per row against best fixed {ratio:.2f}x; planning {planning:.2f} s, {planning / times['per row'][0]:.1%}")


def main() -> None:
    in_one_process()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--index", type=Path, default=Path(tempfile.gettempdir()) / "debian-index", help="Debian's")
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("-t", "--table", action="append", help="only this one: packages, dependencies, functions")
    parser.add_argument("--timed", type=int, default=0, metavar="ROWS", help="rows of the timed jobs; 0: no jobs")
    parser.add_argument("--rounds", type=int, default=1, help="alternating rounds of the timed jobs")
    parser.add_argument("--kv-gib", type=float, default=1.0, help="KV cache: 1 GiB holds 65,536 tokens of this model")
    a = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores; tokenizer of {MODEL.name}")
    kv_tokens = int(a.kv_gib * 2**30) // (2 * 2 * 16 * 4 * 64)  # keys and values, bytes, layers, KV heads, head size
    for table in tables(a.index, a.rows):
        if a.table and table.name not in a.table:
            continue
        if a.timed:
            part = Table(table.name, table.instruction, table.fields, table.rows[: a.timed])
            print(f"{table.name}: the first {len(part.rows):,} rows, 180M random weights, {a.rounds} rounds")
            report_times(part, a, kv_tokens)
            continue
        texts, chosen, planning = ordered(table)
        print(f"{table.name}: {len(table.rows):,} rows, {len(table.fields)} fields; blocks of {BLOCK} tokens")
        found = {}
        for name, prompts in texts.items():
            s = found[name] = shares(prompts, ids_of(prompts), kv_tokens)
            print(f"  {name:>10}: characters {s.characters:.1%}, tokens {s.tokens:.1%}, hits {s.hits:.1%}")
        ratio = found["per row"].hits / found["best fixed"].hits
        scaled = planning * 30_000 / len(table.rows)
        print(f"  per row / best fixed hits {ratio:.2f}x; planning {planning:.1f} s, {scaled:.1f} s per 30,000 rows")
        for line in reachable(table, chosen):
            print(f"  {line}")


if __name__ == "__main__":
    main()
