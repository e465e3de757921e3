"""The search over labels: the exact argmax, in as few steps as the tree of their tokens allows."""

from __future__ import annotations

import math
import random

import pytest

from complete_fn_workers.engine.labels import LabelPlace, LabelSearch, label_tree
from complete_fn_workers.engine.wire import RowRefused

END = 0


def tree(*labels: list[int], end: int | None = END) -> LabelPlace:
    return label_tree(labels, [f"label {n}" for n in range(len(labels))], end)


def probability(place: LabelPlace, label: int, model: dict[tuple[int, ...], dict[int, float]]) -> float:
    """The definition: the product of the label's shares at each place where it parts from another."""
    share = 1.0
    while place.ways:
        total = sum(math.exp(model[place.path][t]) for t in place.ways)
        token, place_behind = next((t, w) for t, w in place.ways.items() if label in w.labels)
        share *= math.exp(model[place.path][token]) / total
        place = place_behind
    return share


def test_labels_that_differ_at_once_take_one_step() -> None:
    search = LabelSearch(tree([5, 6], [7], [8, 9]))
    assert set(search.place.ways) == {5, 7, 8}
    search.tell({5: math.log(0.1), 7: math.log(0.3), 8: math.log(0.1), 99: math.log(0.5)})
    assert (search.answer, search.steps) == (1, 1)
    assert search.scores == pytest.approx([0.2, 0.6, 0.2])


def test_tokens_that_all_labels_share_are_part_of_the_prompt() -> None:
    search = LabelSearch(tree([5, 5, 6], [5, 5, 7]))
    assert search.place.path == (5, 5)
    search.tell({6: -1.0, 7: -2.0})
    assert (search.answer, search.steps) == (0, 1)


def test_a_second_step_only_where_the_likeliest_way_is_shared() -> None:
    labels = tree([5, 6], [5, 7], [8])
    alone = LabelSearch(labels)
    alone.tell({5: math.log(0.4), 8: math.log(0.6)})
    assert (alone.answer, alone.steps, alone.scores) == (2, 1, [None, None, pytest.approx(0.6)])
    shared = LabelSearch(labels)
    shared.tell({5: math.log(0.6), 8: math.log(0.4)})
    assert shared.answer is None
    assert shared.place.path == (5,)
    shared.tell({6: math.log(0.5), 7: math.log(0.5)})  # 0.3 each: the label with a token of its own is likelier
    assert (shared.answer, shared.steps) == (2, 2)
    assert shared.scores == pytest.approx([0.3, 0.3, 0.4])


def test_a_label_that_begins_another_is_told_by_the_token_that_ends_an_answer() -> None:
    search = LabelSearch(tree([5], [5, 6]))
    assert set(search.place.ways) == {END, 6}
    with pytest.raises(RowRefused, match=r"'label 0' begins 'label 1', and the model has no token that ends"):
        tree([5], [5, 6], end=None)


def test_labels_of_equal_tokens_are_named() -> None:
    with pytest.raises(RowRefused, match=r"'label 0' and 'label 2' are the same to the model's tokenizer. Rename"):
        tree([5], [6], [5])


def test_a_label_with_the_token_that_ends_an_answer_is_refused() -> None:
    for label in ([5, END, 6], [5, END], [END]):
        with pytest.raises(RowRefused, match=r"'label 1' has the model's token that ends an answer in it"):
            tree([5], label)


def test_impossible_tokens_do_not_stop_the_search() -> None:
    search = LabelSearch(tree([5], [6]))
    search.tell({5: -math.inf, 6: -math.inf})
    assert (search.answer, search.scores) == (0, [0.5, 0.5])


@pytest.mark.parametrize("seed", range(30))
def test_the_answer_is_the_likeliest_label_of_all(seed: int) -> None:
    draw = random.Random(seed)
    labels = list({tuple(draw.choices(range(1, 4), k=draw.randint(1, 5))) for _ in range(draw.randint(2, 25))})
    if len(labels) < 2:
        labels.append((9,))
    place = label_tree(labels, [str(label) for label in labels], END)
    model: dict[tuple[int, ...], dict[int, float]] = {}

    def fill(at: LabelPlace) -> None:
        if at.ways:
            model[at.path] = {t: draw.gauss(0, 2) for t in at.ways}
        for way in at.ways.values():
            fill(way)

    fill(place)
    search = LabelSearch(place)
    while search.answer is None:
        search.tell(model[search.place.path])
    exact = [probability(place, n, model) for n in range(len(labels))]
    assert sum(exact) == pytest.approx(1.0)
    assert exact[search.answer] == pytest.approx(max(exact))
    assert search.steps <= len(labels) - 1
    for score, other in zip(search.scores, exact, strict=True):
        assert score is None or score == pytest.approx(other)
    assert place.depth <= max(map(len, labels))
