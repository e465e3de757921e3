"""Distilling is faster here: the student runs only at answer tokens, and the teacher's activations are kept in memory.

A served SwiftKV model runs its later layers only where logits are needed, so the student is trained only there. Of a
prompt only the state after the first K layers matters, because keys and values are made from it. This state, and the
teacher's states at the answers, do not change while the student learns. From the second epoch on memory has them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from complete_fn_workers.swiftkv.reference import Llama, States
from complete_fn_workers.swiftkv.training.examples import TokenBatch

FIT_TOKENS = 200_000  # tokens for the fit; five times as many made no difference


@dataclass(frozen=True)
class Lesson:
    """The states of one batch that the student learns from: n answer tokens of r rows, at most a in a row.

    Attributes:
        h: [r, length, hidden_size] the residual stream after layer K - 1.
        at: [r, a] positions whose output predicts an answer token.
        real: [r, a] False behind a row's last position.
        last, before_last: [n, hidden_size] the teacher's `States` at these positions, in the order of `real`.
    """

    h: Tensor
    at: Tensor
    real: Tensor
    last: Tensor
    before_last: Tensor

    @property
    def bytes(self) -> int:
        return sum(t.element_size() * t.numel() for t in (self.h, self.last, self.before_last))


def lesson_of(model: Llama, batch: TokenBatch) -> Lesson:
    """The lesson of a batch. The answer of each row must be its last tokens, without a gap."""
    judged = batch.answer[:, 1:]
    counts = judged.sum(1)
    steps = torch.arange(int(counts.max()), device=judged.device)
    at = (judged.int().argmax(1)[:, None] + steps).clamp(max=judged.shape[1] - 1)
    real = steps[None] < counts[:, None]
    with torch.no_grad():
        h, rotary = model.early(batch.tokens)
        teacher = model.teacher_late(h, rotary)
        rows = torch.arange(len(at), device=at.device)[:, None]
        last, before = (states[rows, at][real] for states in teacher)
    return Lesson(h, at, real, last, before)


def student_states(model: Llama, lesson: Lesson) -> States:
    """The student's states at the lesson's answer tokens, [n, hidden_size] each."""
    last, before = model.student_late(lesson.h, model.rotary(lesson.h), lesson.at)
    return States(last[lesson.real], before[lesson.real])


@dataclass
class ActivationMemory:
    """Keeps lessons by the number of their batch, as many as fit into `room` bytes."""

    room: float
    lessons: dict[int, Lesson] = field(default_factory=dict)

    def lesson(self, number: int, model: Llama, batch: TokenBatch) -> Lesson:
        found = self.lessons.get(number) or lesson_of(model, batch)
        if number not in self.lessons and found.bytes <= self.room:
            self.room -= found.bytes
            self.lessons[number] = found
        return found


def fit_start(model: Llama, batches: Iterable[TokenBatch], tokens: int = FIT_TOKENS) -> None:
    """Set the student's key and value weights by least squares, to give the teacher's from `norm_swiftkv`'s output.

    Layers that share a cache get the mean of their fits, which is the fit of their mean keys and values.
    """
    seen, squares, products = 0, torch.zeros(()), torch.zeros(())
    with torch.no_grad():
        for batch in batches:
            h, rotary = model.early(batch.tokens)
            x = model.norm_swiftkv(h)[batch.real].float()
            wanted = []
            for layer, attention in zip(model.late_layers, model.late_attentions, strict=True):
                own = layer.input_layernorm(h)[batch.real]
                wanted += [attention.k_proj(own), attention.v_proj(own)]
                h = layer(h, *rotary)
            squares, products = squares.to(x) + x.T @ x, products.to(x) + x.T @ torch.cat(wanted, -1).float()
            seen += len(x)
            if seen >= tokens:
                break
        ridge = 1e-4 * squares.diagonal().mean() * torch.eye(len(squares), device=squares.device)
        fits = torch.linalg.solve((squares + ridge).double(), products.double()).T.chunk(2 * len(model.late_layers))
        keys, values = fits[::2], fits[1::2]
        size = model.swiftkv.key_value_group_size if model.swiftkv else 1
        for i, attention in enumerate(model.late_attentions):
            if attention.owner:
                attention.k_proj_swiftkv.weight.copy_(torch.stack(keys[i : i + size]).mean(0))
                attention.v_proj_swiftkv.weight.copy_(torch.stack(values[i : i + size]).mean(0))
