"""Admission by tokens: what the window counts is what a cache of shared prefixes would hold."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from complete_fn_workers.engine.steps.kv_window import KVWindow, common_blocks

BLOCK = 4
prompts = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=24).map(tuple), min_size=1, max_size=12)


def held(window: KVWindow, key: str, ids: tuple[int, ...], answer: int = 3, salt: str = "t") -> None:
    window.hold(key, window.row(salt, ids, answer), salt, ids)


@settings(deadline=None)
@given(prompts.map(sorted), st.randoms(use_true_random=False))
def test_it_never_counts_less_than_the_distinct_blocks_under_way(rows: list[tuple[int, ...]], order: object) -> None:
    """Whatever leaves first: a shared block is counted as long as one of its rows is under way."""
    window, under_way = KVWindow(10**6, BLOCK), {}
    for number, ids in enumerate(rows):
        held(window, str(number), ids)
        under_way[str(number)] = ids
    for key in order.sample(list(under_way), len(under_way)):  # type: ignore[attr-defined]
        assert window.used >= blocks_of(under_way)
        window.release(key)
        del under_way[key]
    assert window.used == 0
    assert window.last is None


def blocks_of(rows: dict[str, tuple[int, ...]]) -> int:
    """Distinct whole blocks of prompts, and those of each row's own that its answer goes on in."""
    shared, own = set(), 0
    for ids in rows.values():
        whole = len(ids) // BLOCK
        shared |= {ids[: (n + 1) * BLOCK] for n in range(whole)}
        own += -(-(len(ids) + 3) // BLOCK) - whole
    return len(shared) + own


def test_a_shared_prefix_is_counted_once_and_rows_wait_for_room() -> None:
    window = KVWindow(12, BLOCK)
    prefix = tuple(range(100, 116))
    held(window, "a", (*prefix, 1))
    assert window.used == 5
    held(window, "b", (*prefix, 2))
    assert window.used == 6
    big = tuple(range(40))
    assert not window.fits(window.row("t", big, 3))
    window.release("a")
    assert window.used == 5
    window.release("b")
    assert window.used == 0
    assert window.fits(window.row("t", big * 9, 3))


def test_tenants_share_nothing() -> None:
    window = KVWindow(100, BLOCK)
    ids = tuple(range(17))
    held(window, "a", ids, salt="one")
    held(window, "b", ids, salt="two")
    assert window.used == 10


def test_the_last_token_of_a_prompt_is_never_cached() -> None:
    assert common_blocks(range(8), range(8), 4) == 1
    assert common_blocks(range(9), range(9), 4) == 2
    assert common_blocks([], [1], 4) == 0
