"""Time and memory of planning millions of prompts of about 200 characters, 30 % of them duplicates."""

from __future__ import annotations

import argparse
import gc
import platform
import resource
import time

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from complete_fn.planning import make_plan


def prompts(rows: int, seed: int = 0) -> pa.ChunkedArray:
    """`rows` prompts as large_string in chunks of 100,000, as a Parquet file brings them."""
    random = np.random.default_rng(seed)
    distinct = int(rows * 0.7)
    chosen = np.concatenate([np.arange(distinct), random.integers(0, distinct, rows - distinct)])
    random.shuffle(chosen)
    chunks = []
    for low in range(0, rows, 100_000):
        numbers = pc.binary_join_element_wise(
            "Name the section: package",
            pa.array(chosen[low : low + 100_000] * 2_654_435_761 % (1 << 40)).cast(pa.string()),
            "is described here in words that fill the line " * 3,
            " ",
        )
        chunks.append(numbers.cast(pa.large_string()))
    return pa.chunked_array(chunks)


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", type=int, nargs="*", default=[1_000_000, 10_000_000])
    a = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, pyarrow {pa.__version__}")
    for rows in sorted(a.rows):
        column = prompts(rows)
        gc.collect()
        pa.default_memory_pool().release_unused()
        before = peak_bytes()
        began = time.perf_counter()
        plan = make_plan(column)
        seconds = time.perf_counter() - began
        beyond = max(peak_bytes() - before, 0)
        print(
            f"{rows:>11,} prompts in {column.num_chunks} chunks, {column.nbytes / 1e6:,.0f} MB, "
            f"{len(plan.first):,} distinct, {len(plan.parts) - 1} parts: "
            f"{seconds:.1f} s, {seconds / (rows * np.log2(rows)) * 1e9:.1f} ns per n log n, "
            f"peak beyond the input {beyond / 1e6:,.0f} MB ({beyond / column.nbytes:.2f} of it)"
        )


if __name__ == "__main__":
    main()
