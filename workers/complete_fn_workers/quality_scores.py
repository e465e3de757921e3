"""These functions score answers against the expected ones: exact match, macro-F1, ROUGE-L, JSON validity."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence

WORDS = re.compile(r"[a-z0-9]+")


def exact_match(answers: Sequence[str | None], expected: Sequence[str]) -> float:
    """The share of answers that equal the expected ones, apart from white space around them."""
    return mean((a or "").strip() == e.strip() for a, e in zip(answers, expected, strict=True))


def macro_f1(answers: Sequence[str | None], expected: Sequence[str]) -> float:
    """The mean over the expected classes of the harmonic mean of precision and recall."""
    hits = Counter(e for a, e in zip(answers, expected, strict=True) if a == e)
    asked, said = Counter(expected), Counter(answers)
    return mean(2 * hits[c] / (asked[c] + said[c]) for c in asked)


def rouge_l(answer: str | None, expected: str) -> float:
    """F1 of the longest common subsequence of words, lower case (Lin 2004, ROUGE-L with beta 1)."""
    a, b = WORDS.findall((answer or "").lower()), WORDS.findall(expected.lower())
    return 2 * common_subsequence(a, b) / (len(a) + len(b)) if a and b else float(a == b)


def mean_rouge_l(answers: Sequence[str | None], expected: Sequence[str]) -> float:
    return mean(rouge_l(a, e) for a, e in zip(answers, expected, strict=True))


def common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """The length of the longest common subsequence, with a bit of one integer for each word of `a` (Hyyrö 2004)."""
    places: dict[str, int] = {}
    for i, word in enumerate(a):
        places[word] = places.get(word, 0) | 1 << i
    row = full = (1 << len(a)) - 1
    for word in b:
        hit = row & places.get(word, 0)
        row = (row + hit | row - hit) & full
    return len(a) - row.bit_count()


def is_json_object(answer: str | None, keys: Sequence[str] | None = None) -> bool:
    """Whether the answer is a JSON object; with `keys`, whether it has exactly these keys, all with texts."""
    try:
        value = json.loads(answer or "")
    except ValueError:
        return False
    if not isinstance(value, dict):
        return False
    return keys is None or (sorted(value) == sorted(keys) and all(isinstance(v, str) for v in value.values()))


def first_sentence(text: str) -> str:
    """The baseline for a synopsis: the text up to its first full stop."""
    return re.split(r"\.(?:\s|$)", " ".join(text.split()), maxsplit=1)[0]


def mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found) if found else float("nan")
