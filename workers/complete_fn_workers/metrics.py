"""Scores of answers against what was expected: accuracy, macro-F1, ROUGE-L, JSON validity."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence

WORDS = re.compile(r"[a-z0-9]+")


def accuracy(answers: Sequence[str | None], expected: Sequence[str]) -> float:
    return sum(a == e for a, e in zip(answers, expected, strict=True)) / len(expected)


def macro_f1(answers: Sequence[str | None], expected: Sequence[str]) -> float:
    """Mean over the expected classes of the harmonic mean of precision and recall."""
    hits = Counter(e for a, e in zip(answers, expected, strict=True) if a == e)
    asked, said = Counter(expected), Counter(answers)
    scores = [2 * hits[c] / (asked[c] + said[c]) for c in asked]
    return sum(scores) / len(scores)


def rouge_l(answer: str | None, expected: str) -> float:
    """F1 of the longest common subsequence of words, lower case (Lin 2004, ROUGE-L with beta 1)."""
    a, b = WORDS.findall((answer or "").lower()), WORDS.findall(expected.lower())
    if not a or not b:
        return float(a == b)
    row = [0] * (len(b) + 1)
    for x in a:
        diagonal = 0
        for j, y in enumerate(b, 1):
            above = row[j]
            row[j] = diagonal + 1 if x == y else max(above, row[j - 1])
            diagonal = above
    return 2 * row[-1] / (len(a) + len(b))


def mean_rouge_l(answers: Sequence[str | None], expected: Sequence[str]) -> float:
    return sum(rouge_l(a, e) for a, e in zip(answers, expected, strict=True)) / len(expected)


def is_json_object(answer: str | None, keys: Sequence[str]) -> bool:
    """Whether the answer is a JSON object with exactly these keys, all texts."""
    try:
        value = json.loads(answer or "")
    except ValueError:
        return False
    return isinstance(value, dict) and sorted(value) == sorted(keys) and all(isinstance(v, str) for v in value.values())


def first_sentence(text: str) -> str:
    """The baseline for a synopsis: the text up to its first full stop."""
    return re.split(r"\.(?:\s|$)", " ".join(text.split()), maxsplit=1)[0]
