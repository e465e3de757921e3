"""The prefix tree as shared tokens, and its cuts into parts."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from complete_fn.planning.prefix_tree import common_tokens, cut_tree, hits

trees = st.lists(st.tuples(st.integers(1, 50), st.integers(0, 49)), min_size=1, max_size=80)


@settings(deadline=None)
@given(trees, st.integers(20, 400))
def test_cuts_cover_the_work_and_keep_their_bound(rows: list[tuple[int, int]], size: int) -> None:
    tokens = np.array([t for t, _ in rows])
    shared = np.minimum([s for _, s in rows], tokens)
    cuts = cut_tree(shared, tokens, size).tolist()
    assert cuts[0] == 0
    assert cuts[-1] == len(rows)
    assert cuts == sorted(set(cuts))
    for low, high in itertools.pairwise(cuts):
        assert high - low == 1 or tokens[low:high].sum() <= size * 1.25 + 1


def test_cuts_fall_between_subtrees() -> None:
    """Ten groups of ten prompts of 10 tokens, 8 of them shared in a group, 2 between groups."""
    tokens = np.full(100, 10)
    shared = np.array([2 if n % 10 == 0 else 8 for n in range(100)])
    cuts = cut_tree(shared, tokens, 200)
    assert [c % 10 for c in cuts.tolist()] == [0] * len(cuts)
    assert shared[cuts[1:-1]].tolist() == [2] * (len(cuts) - 2)


def test_hits_are_whole_blocks_without_the_last_token() -> None:
    assert [hits(s, n, 16) for s, n in ((15, 20), (16, 20), (32, 32), (40, 33), (0, 0))] == [0, 16, 16, 32, 0]
    assert common_tokens([1, 2, 3], [1, 2, 4, 5]) == 2
    assert common_tokens([1, 2], [1, 2, 4]) == 2


def test_shared_beginnings_are_those_of_what_the_model_sees() -> None:
    from complete_fn.planning import make_plan
    from complete_fn.planning.prefix_tree import shared_beginnings
    from complete_fn.text import text_column

    plan = make_plan(text_column(["a" * 70 + "x", "a" * 70 + "y", "b"]))
    assert shared_beginnings(plan).tolist() == [0, 20, 0]
