"""Scores of answers: exact match, macro-F1, ROUGE-L, JSON validity; and of a student beside its teacher by tokens."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from complete_fn_workers.swiftkv.examples import Example, epoch
from complete_fn_workers.swiftkv.reference import Llama

WORD = re.compile(r"[a-z0-9]+")


@dataclass(frozen=True)
class Forced:
    """Given the true answer so far, over all answer tokens: does the student choose as its teacher does?

    `agreement`: share of tokens with the same first choice. `kl`: mean KL(teacher || student) in nats. `teacher_right`,
    `student_right`: share of rows whose every answer token is the first choice.
    """

    rows: int
    tokens: int
    agreement: float
    kl: float
    teacher_right: float
    student_right: float


@torch.no_grad()
def forced(model: Llama, examples: list[Example], batch_tokens: int) -> Forced:
    same = kl = tokens = 0.0
    right = torch.zeros(2)
    device = model.embed_tokens.weight.device
    for batch in epoch(examples, batch_tokens, seed=0):
        ids, judged = batch.tokens.to(device), batch.answer[:, 1:].to(device)
        with torch.autocast(device.type, torch.bfloat16):
            h, rotary = model.early(ids)
            both = [late(h, rotary).last[:, :-1][judged] for late in (model.teacher_late, model.student_late)]
            teacher, student = (model.logits(states).float().log_softmax(-1) for states in both)
        choices = torch.stack((teacher.argmax(-1), student.argmax(-1)))
        same += float((choices[0] == choices[1]).sum())
        kl += float(F.kl_div(student, teacher, log_target=True, reduction="sum"))
        tokens += len(teacher)
        wrong = choices != ids[:, 1:][judged]
        row = judged.nonzero()[:, 0]
        right += len(ids) - torch.stack([torch.bincount(row[w], minlength=len(ids)).gt(0).sum() for w in wrong]).cpu()
    rows = len(examples)
    return Forced(rows, int(tokens), same / tokens, kl / tokens, float(right[0]) / rows, float(right[1]) / rows)


def exact_match(answers: list[str], truth: list[str]) -> float:
    return mean(a.strip() == t.strip() for a, t in zip(answers, truth, strict=True))


def macro_f1(answers: list[str], truth: list[str]) -> float:
    """The mean over the classes that occur in `truth` of each class's F1."""
    hits = Counter(t for a, t in zip(answers, truth, strict=True) if a == t)
    said, true = Counter(answers), Counter(truth)
    return mean(2 * hits[c] / (said[c] + true[c]) for c in true)


def rouge_l(answer: str, truth: str) -> float:
    """F-measure of the longest common subsequence of lower-case words (ROUGE-L, Lin 2004, beta = 1)."""
    a, t = WORD.findall(answer.lower()), WORD.findall(truth.lower())
    return 2 * common_subsequence(a, t) / (len(a) + len(t)) if a and t else float(a == t)


def common_subsequence(a: list[str], b: list[str]) -> int:
    """Its length, a word of `a` per bit of one integer (Hyyrö 2004)."""
    places: dict[str, int] = {}
    for i, word in enumerate(a):
        places[word] = places.get(word, 0) | 1 << i
    row = full = (1 << len(a)) - 1
    for word in b:
        hit = row & places.get(word, 0)
        row = (row + hit | row - hit) & full
    return len(a) - row.bit_count()


def is_json_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


def mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found) if found else float("nan")
