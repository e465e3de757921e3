"""Pass: chooses the order of each prompt's fields, if they are kept apart (`prompts.fields`), then that of the rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise, permutations
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from complete_fn.interrupts import end_if_abandoned
from complete_fn.planning.field_search import Cells, Ints, Near, expected_hits, field_orders, row_order
from complete_fn.planning.plan import BatchPlan
from complete_fn.prompts.fields import FIELDS_MARK, FieldPrompt, has_fields, head, line, unpack_fields
from complete_fn.text import encode_text, to_texts
from complete_fn.tokens import BYTES_PER_TOKEN, TokenSizes

WINDOW = 50_000  # rows arranged at a time: bounds memory; a larger table is first sorted by its best fixed order
MOST_FIXED = 24  # fixed orders tried at most: the permutations of four fields


def order_fields(plan: BatchPlan) -> BatchPlan:
    """The plan with an order of fields for each distinct prompt, and the prompts in the order of their rendered texts.

    Prompts of one template stay together. Prompts that are plain texts come first.
    """
    packed = packed_prompts(plan)
    if not len(packed):
        return plan
    prompts = [unpack_fields(t) for t in to_texts(plan.gather.take(plan.first[packed]))]
    by_template: dict[tuple[str, tuple[str, ...]], list[int]] = {}
    for at, prompt in enumerate(prompts):
        by_template.setdefault((prompt.instruction, prompt.names), []).append(at)
    most = max(len(names) for _, names in by_template)
    orders = np.full((len(plan.first), most), -1, np.int16)
    runs = [np.setdiff1d(np.arange(len(plan.first)), packed)]
    for (_, names), members in by_template.items():
        chosen, rows = arrange_prompts([prompts[m] for m in members], plan.sizes)
        numbers = packed[np.array(members)]
        orders[numbers, : len(names)] = chosen
        runs.append(numbers[rows])
    return reordered(replace(plan, field_order=orders), np.concatenate(runs))


def packed_prompts(plan: BatchPlan) -> Ints:
    """The numbers of the distinct prompts whose fields are kept apart."""
    marked = [pc.starts_with(c, FIELDS_MARK).fill_null(False) for c in plan.prompts.chunks]
    if not any(pc.any(m).as_py() for m in marked):
        return np.empty(0, np.int64)
    return np.flatnonzero(pa.chunked_array(marked).to_numpy()[plan.first])


def reordered(plan: BatchPlan, sequence: Ints) -> BatchPlan:
    """The plan with its distinct prompts in a new order; `sequence` lists their present numbers."""
    number = np.empty(len(sequence), np.int64)
    number[sequence] = np.arange(len(sequence))
    distinct = number[plan.distinct]
    by_number = np.argsort(distinct, kind="stable")
    orders = None if plan.field_order is None else plan.field_order[sequence]
    first = plan.first[sequence]
    return replace(plan, order=plan.order[by_number], distinct=distinct[by_number], first=first, field_order=orders)


def arrange_prompts(prompts: list[FieldPrompt], sizes: TokenSizes) -> tuple[Ints, Ints]:
    """([n, m] order of the fields of each prompt, [n] order of the prompts). All prompts have one template."""
    cells = cells_of(prompts, sizes)
    fixed = best_fixed(cells)
    rows = row_order(cells, fixed)
    chosen = fixed.copy()
    for low in range(0, len(rows), WINDOW):
        end_if_abandoned()
        inside = rows[low : low + WINDOW]
        chosen[inside] = field_orders(window(cells, inside), fixed[inside])
    sequence = row_order(cells, chosen)
    if expected_hits(cells, chosen, sequence) < expected_hits(cells, fixed, rows):
        return fixed, rows
    return chosen, sequence


def window(cells: Cells, rows: Ints) -> Cells:
    return replace(cells, codes=cells.codes[rows], tokens=cells.tokens[rows])


@dataclass(frozen=True)
class Column:
    """One field of all rows.

    Attributes:
        codes: [n] rank of each row's value among the k sorted distinct values.
        tokens: [k] tokens of each distinct value's line.
        near: the tokens that two values have in common at their beginnings.
    """

    codes: Ints
    tokens: Ints
    near: Near


def cells_of(prompts: list[FieldPrompt], sizes: TokenSizes) -> Cells:
    names = prompts[0].names
    columns = [column_of(name, [p.values[f] for p in prompts], sizes) for f, name in enumerate(names)]
    return Cells(
        codes=np.stack([c.codes for c in columns], axis=1),
        tokens=np.stack([c.tokens[c.codes] for c in columns], axis=1),
        near=[c.near for c in columns],
        base=sizes.count([head(prompts[0].instruction)])[0] if prompts[0].instruction else 0,
        block=sizes.block,
    )


def column_of(name: str, values: list[str], sizes: TokenSizes) -> Column:
    """The column of one field. Only repeated values are tokenised, each once: a unique value's line is never shared."""
    raw = [encode_text(v) for v in values]
    distinct, codes, counts = unique(raw)
    lengths = np.array([len(line(name, "")) + len(v) for v in distinct], np.float64)
    repeated = np.flatnonzero(counts > 1)
    tokens = np.ceil(lengths / BYTES_PER_TOKEN).astype(np.int64)
    ratio = BYTES_PER_TOKEN
    if len(repeated):
        lines = [line(name, distinct[v].decode("utf-8", "replace")) for v in repeated.tolist()]
        tokens[repeated] = sizes.count(lines)
        ratio = float(lengths[repeated].sum() / max(1, tokens[repeated].sum()))
    near = [int(common(a, b) / ratio) for a, b in pairwise(distinct)]
    return Column(codes, tokens, Near(np.array(near, np.int64)))


def unique(raw: list[bytes]) -> tuple[list[bytes], Ints, Ints]:
    """(k distinct values in byte order, [n] rank of each value, [k] rows that have each distinct value)."""
    distinct = sorted(set(raw))
    rank = {value: number for number, value in enumerate(distinct)}
    codes = np.fromiter((rank[v] for v in raw), np.int64, len(raw))
    return distinct, codes, np.bincount(codes, minlength=len(distinct)).astype(np.int64)


def common(a: bytes, b: bytes) -> int:
    """Length of the longest common beginning, in bytes. Bisection, because Python compares slices faster than bytes."""
    low, high = 0, min(len(a), len(b))
    if a[:high] == b[:high]:
        return high
    while low + 1 < high:
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return low


def best_fixed(cells: Cells) -> Ints:
    """[n, m] the best order of fields that is the same for all rows.

    Candidates are the template's order and up to `MOST_FIXED` orders, which begin with the four fields whose values
    repeat the most tokens. A large table is judged by a sample of rows.
    """
    n, m = cells.codes.shape
    gains = [repeats(cells, f) for f in range(m)]
    likely = sorted(range(m), key=lambda f: -gains[f])
    head_fields = likely[:4]
    candidates: list[Any] = [(*p, *(f for f in likely if f not in p)) for p in permutations(head_fields)]
    candidates = [*candidates[:MOST_FIXED], tuple(range(m))]
    sample = np.arange(n) if n <= WINDOW else np.sort(np.random.default_rng(0).choice(n, WINDOW, replace=False))
    part = window(cells, sample)

    def worth(order: tuple[int, ...]) -> int:
        orders = np.tile(np.array(order, np.int64), (len(sample), 1))
        return expected_hits(part, orders, row_order(part, orders))

    best = max(candidates, key=worth)
    return np.tile(np.array(best, np.int64), (n, 1))


def repeats(cells: Cells, field: int) -> int:
    """Tokens in the cells of a field whose value another cell has too, without the first cell of each value."""
    codes = cells.codes[:, field]
    counts = np.bincount(codes)
    tokens = np.zeros(len(counts), np.int64)
    tokens[codes] = cells.tokens[:, field]
    return int(((counts - 1).clip(0) * tokens).sum())


def names_in_order(plan: BatchPlan) -> Iterator[list[str] | None]:
    """The names of each distinct prompt's fields in the order that the plan chose; None for a plain text."""
    if plan.field_order is None:
        yield from [None] * len(plan.first)
        return
    for low, texts in plan.texts():
        for number, text in enumerate(texts, low):
            names = unpack_fields(text).names if has_fields(text) else ()
            yield [names[f] for f in plan.field_order[number].tolist() if f >= 0] if names else None


def rendered(plan: BatchPlan, number: int, text: str) -> str:
    """The text that the model sees of a packed prompt, with its fields in the plan's order."""
    if plan.field_order is None:
        return unpack_fields(text).render()
    return unpack_fields(text).render([f for f in plan.field_order[number].tolist() if f >= 0])
