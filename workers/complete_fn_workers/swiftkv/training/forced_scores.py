"""`score_forced` scores a student beside its teacher, token by token, given the true answer so far."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from complete_fn_workers.swiftkv.reference import Llama
from complete_fn_workers.swiftkv.training.examples import Example, epoch


@dataclass(frozen=True)
class ForcedScores:
    """Scores over all answer tokens, each given the true answer before it.

    Attributes:
        agreement: share of tokens for which student and teacher have the same first choice.
        kl: mean KL(teacher || student) in nats.
        teacher_right, student_right: share of rows whose every answer token is the first choice.
    """

    rows: int
    tokens: int
    agreement: float
    kl: float
    teacher_right: float
    student_right: float


@torch.no_grad()
def score_forced(model: Llama, examples: list[Example], batch_tokens: int) -> ForcedScores:
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
    return ForcedScores(rows, int(tokens), same / tokens, kl / tokens, float(right[0]) / rows, float(right[1]) / rows)
