"""The order of fields: against exhaustive search on small tables, and what must hold on any table."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from hypothesis import given, settings
from hypothesis import strategies as st

from complete_fn.planning.field_order import arrange_prompts, best_fixed, cells_of
from complete_fn.planning.field_search import Cells, Near, expected_hits, field_orders, row_order
from complete_fn.prompts.fields import FieldPrompt
from complete_fn.tokens import TokenSizes

SAMPLE = Path(__file__).parents[3] / "sql" / "examples" / "packages.parquet"
FIELDS = ("source", "section", "maintainer", "description")


def table(codes: Sequence[Sequence[int]], tokens: np.ndarray, block: int) -> Cells:
    cells = np.array(codes, np.int64)
    of_cell = np.stack([tokens[f][cells[:, f]] for f in range(cells.shape[1])], axis=1)
    return Cells(cells, of_cell, [Near(np.zeros(tokens.shape[1] - 1, np.int64))] * cells.shape[1], 5, block)


def most_hits(cells: Cells) -> int:
    """The best of all row orders and field orders (Held and Karp's dynamic programme over sets of rows)."""
    n, m = cells.codes.shape
    states = [(r, p) for r in range(n) for p in itertools.permutations(range(m))]
    step = np.array([[shared(cells, *one, *two) for two in states] for one in states])
    width, everyone = len(states) // n, (1 << n) - 1
    best = np.full((1 << n, len(states)), -(10**9))
    for at, (row, _) in enumerate(states):
        best[1 << row, at] = 0
    for rows in range(1, everyone):
        there = np.flatnonzero(best[rows] >= 0)
        if not len(there):
            continue
        reached = (best[rows][there, None] + step[there]).max(axis=0)
        for row in (r for r in range(n) if not rows >> r & 1):
            own = slice(row * width, (row + 1) * width)
            best[rows | 1 << row, own] = np.maximum(best[rows | 1 << row, own], reached[own])
    return int(best[everyone].max())


def shared(cells: Cells, row: int, fields: Sequence[int], other: int, others: Sequence[int]) -> int:
    tokens = cells.base
    for f, g in zip(fields, others, strict=True):
        if f != g or cells.codes[row, f] != cells.codes[other, f]:
            break
        tokens += int(cells.tokens[row, f])
    return cells.hits(tokens)


def planned_hits(cells: Cells) -> int:
    orders = field_orders(cells, best_fixed(cells))
    return expected_hits(cells, orders, row_order(cells, orders))


def test_within_two_percent_of_exhaustive_search_on_small_tables() -> None:
    """Tables of 6 rows and 3 fields with 3 values each: as hard as they come, every field repeats in every row."""
    random = np.random.default_rng(0)
    found = best = 0
    for _ in range(25):
        cells = table(random.integers(0, 3, (6, 3)).tolist(), random.integers(3, 40, (3, 3)), 16)
        planned, exact = planned_hits(cells), most_hits(cells)
        assert planned <= exact
        found, best = found + planned, best + exact
    assert found >= 0.98 * best


def test_within_two_percent_of_exhaustive_search_on_real_rows() -> None:
    rows = list(zip(*(pq.read_table(SAMPLE).column(f).to_pylist() for f in FIELDS[1:]), strict=True))
    random = np.random.default_rng(1)
    found = best = 0
    for start in random.integers(0, len(rows) - 12, 12).tolist():
        chosen = [rows[start + k] for k in sorted(random.choice(12, 6, replace=False).tolist())]
        cells = cells_of([FieldPrompt("Name it.", FIELDS[1:], r) for r in chosen], TokenSizes(block=16))
        cells = replace(cells, near=[Near(np.zeros(6, np.int64))] * 3)  # the search above knows equal cells only
        found, best = found + planned_hits(cells), best + most_hits(cells)
    assert found >= 0.98 * best > 0


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.sampled_from(["", "ab" * 20, "c" * 50, "dd", "ab" * 20 + "x"]), min_size=4, max_size=4)))
def test_each_row_has_each_field_once_and_no_fixed_order_is_better(rows: list[list[str]]) -> None:
    if not rows:
        return
    prompts = [FieldPrompt("i", ("a", "b", "c", "d"), tuple(r)) for r in rows]
    orders, sequence = arrange_prompts(prompts, TokenSizes(block=4))
    assert sorted(sequence.tolist()) == list(range(len(rows)))
    assert (np.sort(orders, axis=1) == np.arange(4)).all()
    cells = cells_of(prompts, TokenSizes(block=4))
    hits = expected_hits(cells, orders, sequence)
    for fixed in itertools.permutations(range(4)):
        same = np.tile(np.array(fixed), (len(rows), 1))
        assert hits >= expected_hits(cells, same, row_order(cells, same))


def test_a_table_larger_than_a_window_is_ordered_in_windows(monkeypatch: object) -> None:
    import complete_fn.planning.field_order as fields

    monkeypatch.setattr(fields, "WINDOW", 16)  # type: ignore[attr-defined]
    rows = [(f"source {n // 4} " * 8, f"maintainer {n % 5} " * 8, str(n)) for n in range(200)]
    prompts = [FieldPrompt("i", ("a", "b", "c"), r) for r in rows]
    orders, sequence = arrange_prompts(prompts, TokenSizes(block=8))
    assert sorted(sequence.tolist()) == list(range(200))
    assert (np.sort(orders, axis=1) == np.arange(3)).all()
