"""The prefix tree as shared tokens: cuts into parts, and which worker gets a part."""

from __future__ import annotations

import itertools
import random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from complete_fn.plan.placement import Loads, Waiting, choose, place
from complete_fn.plan.prefix_tree import common_tokens, cut_cost, cut_tree, hits

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


def test_cuts_fall_between_subtrees_and_their_cost_is_what_is_shared_across() -> None:
    """Ten groups of ten prompts of 10 tokens, 8 of them shared in a group, 2 between groups."""
    tokens = np.full(100, 10)
    shared = np.array([2 if n % 10 == 0 else 8 for n in range(100)])
    cuts = cut_tree(shared, tokens, 200)
    assert [c % 10 for c in cuts.tolist()] == [0] * len(cuts)
    assert cut_cost(shared, cuts) == 2 * (len(cuts) - 2)
    blind = np.array([0, 25, 55, 75, 100])
    assert cut_cost(shared, blind) == 24 > cut_cost(shared, cuts)


def test_hits_are_whole_blocks_without_the_last_token() -> None:
    assert [hits(s, n, 16) for s, n in ((15, 20), (16, 20), (32, 32), (40, 33), (0, 0))] == [0, 16, 16, 32, 0]
    assert common_tokens([1, 2, 3], [1, 2, 4, 5]) == 2
    assert common_tokens([1, 2], [1, 2, 4]) == 2


def part(number: int, shared: int = 100, tokens: int = 1_000) -> Waiting:
    return Waiting(number, "j", number, tokens, shared)


def test_a_subtree_stays_with_its_worker_until_loads_differ_by_more_than_it_shares() -> None:
    loads = Loads()
    for worker in ("a", "b"):
        loads.join(worker)
    loads.give("a", part(0))
    assert place(part(1, shared=2_000), loads) == "a"
    assert place(part(1, shared=500), loads) == "b"
    loads.done("a", part(0))
    assert place(part(1, shared=500), loads) == "a"  # counted down again: the warm worker is free
    assert place(part(1), Loads()) is None


def test_the_cost_of_each_cut_is_counted_once_it_is_made() -> None:
    loads = Loads()
    loads.give("a", part(0, shared=0))
    loads.give("a", part(1))
    assert loads.recomputed == 0
    loads.give("b", part(2))
    assert loads.recomputed == 100
    loads.leave("b")
    loads.give("a", part(3))
    assert loads.recomputed == 200


def test_an_idle_worker_goes_on_where_it_is_warm_and_else_takes_the_cheapest_cut() -> None:
    waiting = [part(1, 50), part(2, 40), part(5, 10), part(7, 30)]
    warm = {"a": ("j", 0), "b": ("j", 6)}
    assert choose(waiting, "a", warm) == part(1, 50)
    assert choose(waiting, "b", warm) == part(7, 30)
    assert choose(waiting, "new", warm) == part(5, 10)
    assert choose([part(1, 50), part(7, 30)], "new", warm) == part(7, 30)  # all are another's: the cheapest spills
    assert choose([], "a", warm) is None


def test_placement_recomputes_less_than_taking_turns_and_keeps_loads_even() -> None:
    """40 parts in runs that share much, 4 workers that end at random: against giving each part to the next worker."""
    parts = [part(n, shared=20 if n % 8 == 0 else 900) for n in range(40)]
    draw, loads, turns = random.Random(1), Loads(), Loads()
    for worker in "abcd":
        loads.join(worker)
    under_way: list[tuple[str, Waiting]] = []
    for number, one in enumerate(parts):
        chosen = place(one, loads)
        assert chosen is not None
        loads.give(chosen, one)
        turns.give("abcd"[number % 4], one)
        under_way.append((chosen, one))
        while len(under_way) > 6:
            loads.done(*under_way.pop(draw.randrange(len(under_way))))
        assert max(loads.tokens.values()) - min(loads.tokens.values()) <= 3_000
    assert loads.recomputed < 0.6 * turns.recomputed


def test_shared_beginnings_are_those_of_what_the_model_sees() -> None:
    from complete_fn.plan import make_plan
    from complete_fn.plan.prefix_tree import shared_beginnings
    from complete_fn.prompts import text_column

    plan = make_plan(text_column(["a" * 70 + "x", "a" * 70 + "y", "b"]))
    assert shared_beginnings(plan).tolist() == [0, 20, 0]
