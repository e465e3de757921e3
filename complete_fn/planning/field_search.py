"""Greedy group recursion chooses for each row the order of its fields in which rows share the most leading tokens.

After "Optimizing LLM Queries in Relational Data Analytics Workloads" (GGR, arXiv 2403.05821), with four differences:

1. Gains are counted as vLLM's prefix cache counts them, in tokens of whole blocks.
2. Functional dependencies are read off each group (a column with one value in it); the caller need not give them.
3. A heap makes the greedy choice, so one level costs n log n.
4. A second pass moves each row to the longest path that other rows have.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Ints: TypeAlias = npt.NDArray[np.int64]
Path: TypeAlias = tuple[int, ...]
BIASES = (0.0, 0.5, 1.0)  # one search each: gains counted in whole blocks, halfway between, in tokens
PASSES = 4  # passes over the rows at most, each of which moves rows to better paths


class Near:
    """The tokens that any two of a field's k distinct values, in sorted order, have in common at their beginnings.

    Args:
        tokens: [k - 1] the tokens that each value shares with the next one.
    """

    def __init__(self, tokens: Ints) -> None:
        self.least = [tokens]  # a sparse table: least[p][i] is the minimum of the 2^p entries from i on
        while len(self.least[-1]) > (step := 1 << (len(self.least) - 1)):
            last = self.least[-1]
            self.least.append(np.minimum(last[:-step], last[step:]))

    def between(self, low: Ints, high: Ints) -> Ints:
        """[n] tokens that the values of ranks `low[i]` and `high[i]` share; low[i] < high[i]."""
        found = np.zeros(len(low), np.int64)
        power = np.log2(np.maximum(high - low, 1)).astype(np.int64)
        for p in np.unique(power).tolist():
            at = np.flatnonzero(power == p)
            least = self.least[p]
            found[at] = np.minimum(least[low[at]], least[high[at] - (1 << p)])
        return found

    def neighbours(self, ranks: Ints) -> int:
        """The sum of the tokens that neighbours share, over the values of `ranks` (sorted, distinct)."""
        return int(self.between(ranks[:-1], ranks[1:]).sum()) if len(ranks) > 1 else 0


@dataclass(frozen=True)
class Cells:
    """A table of n rows and m fields, as the recursion sees it.

    Attributes:
        codes: [n, m] rank of each cell among the sorted distinct values of its field.
        tokens: [n, m] tokens of each cell's line.
        near: for each field, the tokens that two of its values share at their beginnings.
        base: tokens of the instruction, before the first field.
        block: tokens of one KV block.
    """

    codes: Ints
    tokens: Ints
    near: list[Near]
    base: int
    block: int

    def hits(self, tokens: int) -> int:
        return tokens // self.block * self.block


@dataclass(order=True)
class FieldGroup:
    """Rows of one node that have the same value in field `field`; `shared` lists all fields in which they are equal.

    Attributes:
        key: negated gains, so that the heap gives the best group first.
    """

    key: tuple[float, float]
    field: int
    start: int
    rows: Ints
    shared: Path

    def __post_init__(self) -> None:
        self.key = (-self.key[0], -self.key[1])


def field_orders(cells: Cells, fixed: Ints) -> Ints:
    """[n, m] for each row the order in which to render its fields: the best result of several starts.

    Args:
        fixed: [n, m] the best order that is the same for all rows; it is one of the starts.
    """
    n, m = cells.codes.shape
    if n < 2 or m < 2:
        return fixed
    starts = [fixed]
    for bias in BIASES:
        starts.append(np.empty((n, m), np.int64))
        arrange(cells, np.arange(n), tuple(range(m)), (), cells.base, bias, starts[-1])
    tried = [improved(cells, start) for start in starts]
    return max(tried, key=lambda orders: expected_hits(cells, orders, row_order(cells, orders)))


def arrange(cells: Cells, rows: Ints, left: Path, path: Path, prefix: int, bias: float, orders: Ints) -> None:
    """Fill `orders` for `rows`. They share the fields of `path`, of `prefix` tokens; those of `left` are still open."""
    free = np.ones(len(rows), bool)
    where = np.full(len(cells.codes), -1, np.int64)
    where[rows] = np.arange(len(rows))
    heap = groups(cells, rows, left, prefix, bias) if len(left) > 1 and len(rows) > 1 else []
    heapq.heapify(heap)
    while heap:
        group = heapq.heappop(heap)
        mine = group.rows[free[where[group.rows]]]
        if len(mine) < 2:
            continue
        if len(mine) < len(group.rows):
            heapq.heappush(heap, regroup(cells, mine, group, left, prefix, bias))
            continue
        free[where[mine]] = False
        shared = ranked(cells, rows, mine[0], group.shared)
        open_fields = tuple(f for f in left if f not in shared)
        more = int(cells.tokens[mine[0], list(shared)].sum())
        arrange(cells, mine, open_fields, path + shared, prefix + more, bias, orders)
    alone = rows[free]
    if len(alone):
        orders[alone] = path + by_likeness(cells, alone, left)


def groups(cells: Cells, rows: Ints, left: Path, prefix: int, bias: float) -> list[FieldGroup]:
    """One group for each value of each open field that at least two rows have."""
    found = []
    codes = cells.codes[rows]
    for field in left:
        order = np.argsort(codes[:, field], kind="stable")
        ranks = codes[order, field]
        starts = np.append(0, np.flatnonzero(ranks[1:] != ranks[:-1]) + 1)
        counts = np.append(starts[1:], len(rows)) - starts
        if counts.max() < 2:
            continue
        by_value = codes[order][:, left]
        constant = np.minimum.reduceat(by_value, starts) == np.maximum.reduceat(by_value, starts)
        for start, count, same in zip(starts.tolist(), counts.tolist(), constant, strict=True):
            if count > 1:
                mine = rows[order[start : start + count]]
                shared = tuple(f for f, s in zip(left, same.tolist(), strict=True) if s)
                found.append(group_of(cells, mine, field, shared, prefix, bias))
    return found


def regroup(cells: Cells, mine: Ints, group: FieldGroup, left: Path, prefix: int, bias: float) -> FieldGroup:
    """The group with only those rows that no better group has taken."""
    codes = cells.codes[mine]
    same = (codes == codes[0]).all(axis=0)
    return group_of(cells, mine, group.field, tuple(f for f in left if same[f]), prefix, bias)


def group_of(cells: Cells, mine: Ints, field: int, shared: Path, prefix: int, bias: float) -> FieldGroup:
    """A group with its gain: the tokens that all its rows but the first find in the cache, in whole blocks.

    `bias` is the share in which tokens beyond the last whole block count too: a longer path may fill the block.
    """
    more = int(cells.tokens[mine[0], list(shared)].sum())
    whole = cells.hits(prefix + more) - cells.hits(prefix)
    copies = len(mine) - 1
    return FieldGroup((copies * (whole + bias * (more - whole)), copies * more), field, int(mine[0]), mine, shared)


def ranked(cells: Cells, rows: Ints, row: int, shared: Path) -> Path:
    """The shared fields, ordered by how many rows of the node have the value: other groups may share that beginning."""
    common = {f: int((cells.codes[rows, f] == cells.codes[row, f]).sum()) for f in shared}
    return tuple(sorted(shared, key=lambda f: (-common[f], f)))


def by_likeness(cells: Cells, rows: Ints, left: Path) -> Path:
    """An order for rows without a repeated cell: the field whose values share the longest beginnings comes first."""
    if len(rows) == 1:
        return tuple(sorted(left))
    likeness = {f: cells.near[f].neighbours(np.unique(cells.codes[rows, f])) for f in left}
    return tuple(sorted(left, key=lambda f: (-likeness[f], f)))


class Tree:
    """The trie of all rows' paths. Nodes are numbers; the root is 0."""

    def __init__(self, cells: Cells) -> None:
        self.cells = cells
        self.codes = cells.codes.tolist()
        self.tokens = cells.tokens.tolist()
        self.child: dict[tuple[int, int, int], int] = {}
        self.count: defaultdict[int, int] = defaultdict(int)

    def walk(self, row: int, path: Path, change: int) -> None:
        node = 0
        codes = self.codes[row]
        for field in path:
            key = (node, field, codes[field])
            node = self.child.setdefault(key, len(self.child) + 1)
            self.count[node] += change

    def best(self, row: int, left: Path, node: int, tokens: int) -> tuple[int, Path]:
        """(tokens shared, fields) of the longest path from `node` that other rows have and this row could take."""
        found: tuple[int, Path] = (tokens, ())
        for field in left:
            child = self.child.get((node, field, self.codes[row][field]))
            if child is not None and self.count[child]:
                rest = tuple(f for f in left if f != field)
                reached, path = self.best(row, rest, child, tokens + self.tokens[row][field])
                if reached > found[0]:
                    found = (reached, (field, *path))
        return found


def improved(cells: Cells, orders: Ints) -> Ints:
    """The orders after rows moved to longer paths of other rows. A pass that does not improve the total ends this."""
    best, most = orders, expected_hits(cells, orders, row_order(cells, orders))
    tree = Tree(cells)
    paths = [tuple(p) for p in orders.tolist()]
    for row, path in enumerate(paths):
        tree.walk(row, path, 1)
    fields = tuple(range(orders.shape[1]))
    for _ in range(PASSES):
        now = shared_now(cells, np.array(paths, np.int64)).tolist()
        for row, path in enumerate(paths):
            tree.walk(row, path, -1)
            reached, begin = tree.best(row, fields, 0, cells.base)
            if cells.hits(reached) > cells.hits(now[row]):
                paths[row] = path = begin + tuple(f for f in path if f not in begin)
            tree.walk(row, path, 1)
        orders = np.array(paths, np.int64)
        found = expected_hits(cells, orders, row_order(cells, orders))
        if found <= most:
            break
        best, most = orders, found
    return best


def shared_now(cells: Cells, orders: Ints) -> Ints:
    """[n] the larger number of tokens that each row shares with the row before it or the row behind it."""
    rows = row_order(cells, orders)
    between = shared_tokens(cells, orders, rows)
    now = np.zeros(len(rows), np.int64)
    now[rows[1:]] = between
    now[rows[:-1]] = np.maximum(now[rows[:-1]], between)
    return now


def row_order(cells: Cells, orders: Ints) -> Ints:
    """[n] row numbers in the order of the rendered texts, so that rows with the longest common paths are neighbours."""
    n, m = orders.shape
    ordered = np.take_along_axis(cells.codes, orders, axis=1)
    keys = orders * (int(cells.codes.max(initial=0)) + 1) + ordered
    return np.lexsort(keys.T[::-1]) if n and m else np.arange(n)


def expected_hits(cells: Cells, orders: Ints, rows: Ints) -> int:
    """The sum of the tokens that each of `rows`, in this order, shares with the row before it, in whole blocks."""
    return int((shared_tokens(cells, orders, rows) // cells.block * cells.block).sum())


def shared_tokens(cells: Cells, orders: Ints, rows: Ints) -> Ints:
    """[n - 1] tokens that each of `rows` but the first shares with the row before it.

    Shared are the leading cells that are equal, and the common beginning of the first cells that differ.
    """
    chosen, m = orders[rows], orders.shape[1]
    codes, tokens = (np.take_along_axis(x[rows], chosen, axis=1) for x in (cells.codes, cells.tokens))
    same = (chosen[1:] == chosen[:-1]) & (codes[1:] == codes[:-1])
    leading = np.cumprod(same, axis=1)
    shared: Ints = cells.base + (leading * tokens[1:]).sum(axis=1)
    first = leading.sum(axis=1)
    at = np.flatnonzero(first < m)
    field, other = chosen[1:][at, first[at]], chosen[:-1][at, first[at]]
    one, two = codes[1:][at, first[at]], codes[:-1][at, first[at]]
    for f in range(m):
        mine = np.flatnonzero((field == f) & (other == f))
        low, high = np.minimum(one[mine], two[mine]), np.maximum(one[mine], two[mine])
        shared[at[mine]] += cells.near[f].between(low, high)
    return shared
