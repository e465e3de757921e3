"""Scores against values worked out by hand."""

from __future__ import annotations

import random

import pytest

pytest.importorskip("torch")

from complete_fn.engines.base import EchoEngine
from complete_fn_workers.quality_scores import common_subsequence, exact_match, macro_f1, rouge_l
from complete_fn_workers.swiftkv.training.evaluate import compare_answers, format_scores
from complete_fn_workers.swiftkv.training.examples import TableRow

pytestmark = pytest.mark.engine  # swiftkv.evaluate imports torch


def by_table(a: list[str], b: list[str]) -> int:
    """The textbook's quadratic algorithm."""
    best = [0] * (len(b) + 1)
    for x in a:
        above = 0
        for j, y in enumerate(b, 1):
            above, best[j] = best[j], above + 1 if x == y else max(best[j], best[j - 1])
    return best[-1]


def test_common_subsequence() -> None:
    choose = random.Random(1)
    for _ in range(300):
        a, b = (choose.choices("abcd", k=choose.randrange(0, 40)) for _ in range(2))
        assert common_subsequence(a, b) == by_table(a, b)


def test_rouge_l() -> None:
    # 4 of 5 and of 6 words in common order: 2 * 4 / 11.
    assert rouge_l("The cat sat here, today", "the dog cat sat today also") == pytest.approx(8 / 11)
    assert rouge_l("", "words") == 0.0
    assert rouge_l("", "") == 1.0


def test_macro_f1() -> None:
    # a: precision 1/2, recall 1 -> 2/3; b: 1/2, 1/2 -> 1/2; c: never said -> 0.
    truth = ["a", "b", "b", "c"]
    answers = ["a", "b", "a", "b"]
    assert macro_f1(answers, truth) == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    assert exact_match(answers, truth) == 0.5


def test_comparison_counts_a_failed_row_as_an_empty_answer() -> None:
    rows = [TableRow("yes", "yes"), TableRow('{"a": 1}', '{"a": 1}'), TableRow("too long for the student", "no")]
    engines = {"t": EchoEngine(), "s": EchoEngine(context=5)}
    scores = compare_answers({"teacher": "t", "student": "s"}, engines.__getitem__, rows, None)
    assert scores["teacher"]["exact_match"] == pytest.approx(2 / 3)
    assert scores["student"]["same_as_teacher"] == pytest.approx(2 / 3)
    assert scores["student"]["json_valid"] == 1.0
    assert scores["student"]["ended"] == pytest.approx(2 / 3)
    printed = " ".join(format_scores({"rows": 3, "answers": scores}).split())
    assert "answers equal to the teacher's 1.0000 0.6667" in printed
