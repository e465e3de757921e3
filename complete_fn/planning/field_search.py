"""Greedy group recursion: for each row of a table the order of its fields in which most leading tokens are shared.

After "Optimizing LLM Queries in Relational Data Analytics Workloads" (GGR, arXiv 2403.05821), with these differences:
gains are tokens as vLLM's prefix cache counts them, whole blocks; functional dependencies are read off each group (a
column with one value in it) instead of being given; the greedy choice is made with a heap, so that a level costs
n log n; and a second pass moves each row to the longest path that other rows have.
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
BIASES = (0.0, 0.5, 1.0)  # starts of the search: gains in whole blocks, in tokens, and between
PASSES = 4  # over the rows at most, to move each to a better path


class Near:
    """For the k distinct values of a field in sorted order: tokens that any two have in common at their beginning.

    Args:
        tokens: [k - 1] what each value shares with the next one.
    """

    def __init__(self, tokens: Ints) -> None:
        self.least = [tokens]  # least[p][i]: the least of 2^p neighbours from i on (a sparse table)
        while len(self.least[-1]) > (step := 1 << (len(self.least) - 1)):
            last = self.least[-1]
            self.least.append(np.minimum(last[:-step], last[step:]))

    def between(self, low: Ints, high: Ints) -> Ints:
        """[n] tokens that the values of ranks `low` and `high` share, low < high each."""
        found = np.zeros(len(low), np.int64)
        power = np.log2(np.maximum(high - low, 1)).astype(np.int64)
        for p in np.unique(power).tolist():
            at = np.flatnonzero(power == p)
            least = self.least[p]
            found[at] = np.minimum(least[low[at]], least[high[at] - (1 << p)])
        return found

    def neighbours(self, ranks: Ints) -> int:
        """Tokens that neighbours among sorted distinct `ranks` share, summed."""
        return int(self.between(ranks[:-1], ranks[1:]).sum()) if len(ranks) > 1 else 0


@dataclass(frozen=True)
class Cells:
    """A table as the recursion sees it: n rows, m fields.

    Attributes:
        codes: [n, m] rank of each cell among the sorted distinct values of its field.
        tokens: [n, m] tokens of each cell's line.
        near: for each field what its values share at their beginnings.
        base: tokens before the first field.
        block: tokens of a KV block.
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
    """Rows of one node that have one value in field `field`; `shared` are all fields with one value in these rows."""

    key: tuple[float, float]
    field: int
    start: int
    rows: Ints
    shared: Path

    def __post_init__(self) -> None:
        self.key = (-self.key[0], -self.key[1])


def field_orders(cells: Cells, fixed: Ints) -> Ints:
    """[n, m] for each row its fields in the order to render them: the best of what was found from several starts.

    Args:
        fixed: [n, m] the best order that all rows have alike, one of the starts.
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
    """Fill `orders` for `rows`, which share the fields `path` (`prefix` tokens) and have the fields `left` open."""
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
    """The groups of at least two rows, one for each repeated value of each open field."""
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
    """The group with the rows that no better one has taken."""
    codes = cells.codes[mine]
    same = (codes == codes[0]).all(axis=0)
    return group_of(cells, mine, group.field, tuple(f for f in left if same[f]), prefix, bias)


def group_of(cells: Cells, mine: Ints, field: int, shared: Path, prefix: int, bias: float) -> FieldGroup:
    """Its gain is what all but the first row find in the cache, in whole blocks; `bias` is the share that counts in
    tokens, as the path may go on."""
    more = int(cells.tokens[mine[0], list(shared)].sum())
    whole = cells.hits(prefix + more) - cells.hits(prefix)
    copies = len(mine) - 1
    return FieldGroup((copies * (whole + bias * (more - whole)), copies * more), field, int(mine[0]), mine, shared)


def ranked(cells: Cells, rows: Ints, row: int, shared: Path) -> Path:
    """The shared fields, the value first that most rows of the node have: other groups may go along with it."""
    common = {f: int((cells.codes[rows, f] == cells.codes[row, f]).sum()) for f in shared}
    return tuple(sorted(shared, key=lambda f: (-common[f], f)))


def by_likeness(cells: Cells, rows: Ints, left: Path) -> Path:
    """An order for rows without a repeated cell: first the field whose values have the most beginning in common."""
    if len(rows) == 1:
        return tuple(sorted(left))
    likeness = {f: cells.near[f].neighbours(np.unique(cells.codes[rows, f])) for f in left}
    return tuple(sorted(left, key=lambda f: (-likeness[f], f)))


class Tree:
    """The trie of all rows' paths; a node is a number, the root 0."""

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
        """(tokens shared, fields) of the longest path of other rows that this row can take from `node`."""
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
    """The orders with rows moved to longer paths of other rows, as long as that makes the whole better."""
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
    """[n] tokens that each row shares with the row before or behind it, whichever is more."""
    rows = row_order(cells, orders)
    between = shared_tokens(cells, orders, rows)
    now = np.zeros(len(rows), np.int64)
    now[rows[1:]] = between
    now[rows[:-1]] = np.maximum(now[rows[:-1]], between)
    return now


def row_order(cells: Cells, orders: Ints) -> Ints:
    """[n] rows so that those with the longest common paths are neighbours: the order of their rendered texts."""
    n, m = orders.shape
    ordered = np.take_along_axis(cells.codes, orders, axis=1)
    keys = orders * (int(cells.codes.max(initial=0)) + 1) + ordered
    return np.lexsort(keys.T[::-1]) if n and m else np.arange(n)


def expected_hits(cells: Cells, orders: Ints, rows: Ints) -> int:
    """Tokens that each of `rows`, in this order, finds of the one before it, in whole blocks."""
    return int((shared_tokens(cells, orders, rows) // cells.block * cells.block).sum())


def shared_tokens(cells: Cells, orders: Ints, rows: Ints) -> Ints:
    """[n - 1] tokens that each of `rows` but the first shares with the one before it: equal leading cells, and the
    beginning of the first that differs."""
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
