"""What orders of rows and fields, one a row, let a prefix cache give back at most."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import coo_array, vstack
from scipy.sparse.csgraph import minimum_spanning_tree

from complete_fn.planning.field_search import Cells, Ints, Near


def most_hits(cells: Cells) -> int:
    """Tokens, in whole blocks, that n rows find at most, the cache never full.

    What a row finds, it finds of one row before it: the fields in which both are equal, and of one more field the
    beginning. So all finds are a forest over the rows, and no forest weighs more than the heaviest spanning one.
    The bound need not be reachable: a row that two others want in two orders has only one.
    """
    n, m = cells.codes.shape
    edges: list[tuple[Ints, Ints, Ints]] = []
    for size in range(m + 1):
        for equal in combinations(range(m), size):
            for field in [f for f in range(m) if f not in equal] or [None]:
                edges.append(neighbours(cells, list(equal), field))
    low, high, tokens = (np.concatenate(e) for e in zip(*edges, strict=True))
    heaviest = np.lexsort((-tokens, high, low))  # one edge a pair: parallel ones would be added up
    low, high, tokens = low[heaviest], high[heaviest], tokens[heaviest]
    kept = np.append(True, (low[1:] != low[:-1]) | (high[1:] != high[:-1]))
    graph = coo_array((-tokens[kept], (low[kept], high[kept])), shape=(n, n)).tocsr()
    return -int(minimum_spanning_tree(graph).sum())


def neighbours(cells: Cells, equal: list[int], field: int | None) -> tuple[Ints, Ints, Ints]:
    """Pairs of rows with the same values in `equal`, neighbours by the value of `field`: ([k], [k], [k] tokens)."""
    keys = [cells.codes[:, f] for f in ([] if field is None else [field])]
    rows = np.lexsort([*keys, *(cells.codes[:, f] for f in equal), np.zeros(len(cells.codes), np.int64)])
    codes = cells.codes[rows]
    at = np.flatnonzero((codes[1:, equal] == codes[:-1, equal]).all(axis=1))
    one, two = rows[at], rows[at + 1]
    tokens = cells.base + cells.tokens[one][:, equal].sum(axis=1)
    if field is not None:
        low, high = cells.codes[one, field], cells.codes[two, field]
        other = low != high
        tokens[other] += cells.near[field].between(low[other], high[other])
    tokens = tokens // cells.block * cells.block
    some = tokens > 0
    return np.minimum(one, two)[some], np.maximum(one, two)[some], tokens[some]


def most_by_sides(cells: Cells, sides: tuple[tuple[int, ...], ...]) -> int:
    """Tokens, in whole blocks, that n rows find at most if each has the fields of one side first, and finds them whole.

    Of the rows that begin with the same side of the same values, all but the first find it: which side each row should
    begin with is a facility location problem, here its linear programme (by HiGHS): an upper bound, and reached where
    its solution is whole numbers, as that of `dependencies` is.
    """
    n = len(cells.codes)
    numbers: list[Ints] = []
    tokens: list[Ints] = []
    for side in sides:
        _, first, number = np.unique(cells.codes[:, side], axis=0, return_index=True, return_inverse=True)
        whole = cells.base + cells.tokens[first][:, side].sum(axis=1)
        numbers.append(number.reshape(n) + sum(map(len, tokens)))
        tokens.append(whole // cells.block * cells.block)
    place, worth = np.concatenate(numbers), np.concatenate(tokens)
    k, groups = len(place), len(worth)
    chosen = np.arange(k)
    one_side = coo_array((np.ones(k), (chosen % n, chosen)), shape=(n, k + groups))
    entries = np.concatenate([np.ones(k), -np.ones(k)])
    begun = coo_array((entries, (np.tile(chosen, 2), np.concatenate([chosen, k + place]))), shape=(k, k + groups))
    limits = np.concatenate([np.ones(n), np.zeros(k)])
    costs = np.concatenate([-worth[place], worth])
    found = linprog(costs, A_ub=vstack([one_side, begun]).tocsr(), b_ub=limits, bounds=(0, 1), method="highs")
    return round(-found.fun)


def whole_fields(cells: Cells) -> Cells:
    """The cells as if no two values began alike."""
    return replace(cells, near=[Near(np.zeros_like(near.least[0])) for near in cells.near])
