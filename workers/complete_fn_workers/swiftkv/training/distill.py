"""`complete-fn swiftkv distill` trains a student as published for SwiftKV (*knowledge recovery*).

One model object is teacher and student. The teacher's weights stay unchanged. `norm_swiftkv` and the later layers'
`q/k/v_proj_swiftkv` are trained with AdamW on T^2 * KL(teacher || student) of the answer tokens plus the mean squared
difference of the last layer's input over all tokens (arXiv 2410.03960 and its training code).
"""

from __future__ import annotations

import math
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F

from complete_fn.errors import InputError
from complete_fn_workers.swiftkv.reference import Llama, Rotary, States
from complete_fn_workers.swiftkv.training.activations import ActivationMemory, Lesson, student_states
from complete_fn_workers.swiftkv.training.examples import LENGTHS, Example, TokenBatch, epoch
from complete_fn_workers.swiftkv.training.plot import draw_curves

SAVE_SECONDS = 60
SHAPES = len(LENGTHS) + 4


@dataclass(frozen=True)
class Recipe:
    """The settings of a training. `lr`, `temperature` and `hidden_loss_mult` are published, for 8B and larger models.

    Attributes:
        epochs, max_tokens, max_minutes: the training ends at the first of these; tokens include padding.
        kl_over: `all` averages the KL over all tokens of a batch, with 0 for prompts, as the published code does; short
            answers then have almost no weight beside the hidden states. `answers` averages over the answer tokens.
        prompt_share: share of the prompts' tokens that count as answers, for tables with too few answers to learn from.
        start: keys and values begin as published, or `fitted` to the teacher's by least squares.
        memory_gib: above 0, the student runs only at answer tokens, and is compared with the teacher's hidden states
            only there; later epochs take the teacher's states from so much memory.
    """

    lr: float = 2e-4
    warm_up: float = 0.05
    temperature: float = 2.0
    hidden_loss_mult: float = 1.0
    epochs: float = 1.0
    max_tokens: float = math.inf
    max_minutes: float = math.inf
    batch_tokens: int = 8192
    kl_over: Literal["answers", "all"] = "answers"
    prompt_share: float = 0.0
    start: Literal["published", "fitted"] = "published"
    memory_gib: float = 0.0
    seed: int = 0


@dataclass
class DistillProgress:
    """How far a run is. It is saved beside the weights, so that the run can be resumed."""

    epoch: int = 0
    batches: int = 0
    tokens: int = 0
    seconds: float = 0.0
    history: list[tuple[float, float, float]] = field(default_factory=list)  # million tokens, KL, MSE

    def share(self, recipe: Recipe, batches_per_epoch: int) -> float:
        """The share of the run that is done, from 0 to 1."""
        epochs = (self.epoch + self.batches / batches_per_epoch) / recipe.epochs
        return max(epochs, self.tokens / recipe.max_tokens, self.seconds / 60 / recipe.max_minutes)


class ModelParts:
    """The model's three parts. If `compiled`, each is compiled once for each length."""

    def __init__(self, model: Llama, compiled: bool) -> None:
        def made(part: Callable[..., Any]) -> Callable[..., Any]:
            return torch.compile(part, dynamic=False) if compiled else part

        if compiled:
            torch.compiler.config.recompile_limit = 2 * SHAPES
        self.early: Callable[[torch.Tensor], tuple[torch.Tensor, Rotary]] = made(model.early)
        self.teacher: Callable[[torch.Tensor, Rotary], States] = made(model.teacher_late)
        self.student: Callable[[torch.Tensor, Rotary], States] = made(model.student_late)


def losses(model: Llama, halves: ModelParts, batch: TokenBatch, recipe: Recipe) -> tuple[torch.Tensor, torch.Tensor]:
    """(T^2 * KL, mean squared error of the hidden states), both scalars.

    The first K layers run once, because teacher and student share them and they need no gradient.
    """
    with torch.no_grad():
        h, rotary = halves.early(batch.tokens)
        teacher = halves.teacher(h, rotary)
    student = halves.student(h, rotary)
    judged = batch.answer[:, 1:]
    with torch.no_grad():
        wanted = (model.logits(teacher.last[:, :-1][judged]).float() / recipe.temperature).log_softmax(-1)
    given = (model.logits(student.last[:, :-1][judged]).float() / recipe.temperature).log_softmax(-1)
    count = len(wanted) if recipe.kl_over == "answers" else int(batch.real.sum())
    kl = recipe.temperature**2 * F.kl_div(given, wanted, log_target=True, reduction="sum") / max(count, 1)
    off = (student.before_last - teacher.before_last)[batch.real].float()
    return kl, off.pow(2).mean()


def answer_losses(model: Llama, lesson: Lesson, recipe: Recipe) -> tuple[torch.Tensor, torch.Tensor]:
    """As `losses`, but both are over the answer tokens."""
    student = student_states(model, lesson)
    with torch.no_grad():
        wanted = (model.logits(lesson.last).float() / recipe.temperature).log_softmax(-1)
    given = (model.logits(student.last).float() / recipe.temperature).log_softmax(-1)
    kl = recipe.temperature**2 * F.kl_div(given, wanted, log_target=True, reduction="sum") / max(len(wanted), 1)
    return kl, (student.before_last - lesson.before_last).float().pow(2).mean()


def freeze_teacher(model: Llama, frozen: torch.dtype) -> dict[str, torch.nn.Parameter]:
    """Make only the student's parameters trainable, in float32; the others get the type `frozen`.

    Returns the student's parameters by name.
    """
    trained = {}
    for name, p in model.named_parameters():
        if "swiftkv" in name:
            p.data = p.data.float()
            trained[name] = p
        else:
            p.requires_grad_(False)
            p.data = p.data.to(frozen)
    if not trained:
        raise InputError(
            "The model has no SwiftKV parameters to train. Convert it first: `complete-fn swiftkv convert`."
        )
    return trained


class DistillState:
    """Weights, optimizer and progress of a run, in one folder. Each save replaces them in one step."""

    def __init__(self, folder: Path, trained: dict[str, torch.nn.Parameter], recipe: Recipe) -> None:
        self.path = folder / "state.pt"
        self.trained, self.recipe = trained, recipe
        self.optimizer = torch.optim.AdamW(
            trained.values(), lr=recipe.lr, betas=(0.9, 0.999), weight_decay=0.0, fused=True
        )
        self.progress = DistillProgress()

    def resume(self) -> bool:
        """Resume an interrupted run. Returns False if there is none.

        Raises:
            InputError: The run was begun with another recipe.
        """
        if not self.path.is_file():
            return False
        stored = torch.load(self.path, weights_only=True)
        recipe = asdict(self.recipe)
        changed = [k for k, v in stored["recipe"].items() if recipe[k] != v and not k.startswith("max_")]
        if changed:
            raise InputError(f"'{self.path}' was begun with another {changed[0]}. Name it again, or use --restart.")
        with torch.no_grad():
            for name, p in self.trained.items():
                p.copy_(stored["trained"][name])
        self.optimizer.load_state_dict(stored["optimizer"])
        self.progress = DistillProgress(**stored["progress"])
        return True

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.path.with_suffix(".partial")
        state = {
            "trained": {name: p.detach() for name, p in self.trained.items()},
            "optimizer": self.optimizer.state_dict(),
            "progress": asdict(self.progress),
            "recipe": asdict(self.recipe),
        }
        torch.save(state, fresh)
        fresh.replace(self.path)
        history = self.progress.history
        curves = {
            "T^2 KL": [(x, kl) for x, kl, _ in history],
            "hidden states' MSE": [(x, mse) for x, _, mse in history],
        }
        draw_curves(curves, self.path.parent / "loss.png", "million tokens (padded)")


def remaining_batches(
    examples: list[Example], recipe: Recipe, progress: DistillProgress
) -> Iterator[tuple[int, TokenBatch]]:
    """(number, batch) of the batches that are left, without end. With a memory, epochs shuffle the same batches."""
    fixed = list(epoch(examples, recipe.batch_tokens, recipe.seed)) if recipe.memory_gib else []
    while True:
        seed, done = recipe.seed + progress.epoch, progress.batches
        if fixed:
            order = random.Random(seed).sample(range(len(fixed)), len(fixed))
            yield from ((number, fixed[number]) for number in order[done:])
        else:
            batches = enumerate(epoch(examples, recipe.batch_tokens, seed, recipe.prompt_share))
            yield from ((number, batch) for number, batch in batches if number >= done)
        progress.epoch, progress.batches = progress.epoch + 1, 0


def learning_rate(share: float, warm_up: float) -> float:
    """The factor of the learning rate: a linear warm-up, then a linear fall to 0."""
    return min(share / warm_up if warm_up else 1.0, (1 - share) / (1 - warm_up))


def train(
    model: Llama,
    state: DistillState,
    examples: list[Example],
    compiled: bool = False,
    report: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
) -> None:
    """Train until the recipe ends. The state is saved every minute, at the end, and on an interrupt.

    Raises:
        InputError: There is no example to train on.
    """
    recipe, progress = state.recipe, state.progress
    per_epoch = sum(1 for _ in epoch(examples, recipe.batch_tokens, recipe.seed))
    if not per_epoch:
        raise InputError("No row has both prompt and answer and fits the model's context.")
    halves = ModelParts(model, compiled)
    device = model.embed_tokens.weight.device
    memory = ActivationMemory(recipe.memory_gib * 2**30)
    began, saved = time.monotonic() - progress.seconds, time.monotonic()
    try:
        for number, batch in remaining_batches(examples, recipe, progress):
            share = progress.share(recipe, per_epoch)
            if share >= 1:
                break
            here = batch.to(device)
            with torch.autocast(device.type, torch.bfloat16):
                if recipe.memory_gib:
                    kl, mse = answer_losses(model, memory.lesson(number, model, here), recipe)
                else:
                    kl, mse = losses(model, halves, here, recipe)
            take_step(state, kl, mse, share)
            progress.batches += 1
            progress.tokens += batch.tokens.numel()
            progress.history.append((progress.tokens / 1e6, kl.item(), mse.item()))
            progress.seconds = time.monotonic() - began
            if time.monotonic() - saved > SAVE_SECONDS:
                saved = time.monotonic()
                state.save()
                report(progress_line(progress, share))
    finally:
        state.save()
    report(progress_line(progress, 1.0))


def take_step(state: DistillState, kl: torch.Tensor, mse: torch.Tensor, share: float) -> None:
    recipe = state.recipe
    for group in state.optimizer.param_groups:
        group["lr"] = recipe.lr * learning_rate(share, recipe.warm_up)
    torch.autograd.backward(kl + recipe.hidden_loss_mult * mse)
    torch.nn.utils.clip_grad_norm_(state.trained.values(), 1.0)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)


def progress_line(progress: DistillProgress, share: float) -> str:
    recent = progress.history[-50:] or [(0.0, math.nan, math.nan)]
    kl, mse = (sum(column) / len(recent) for column in list(zip(*recent, strict=True))[1:])
    speed = progress.tokens / max(progress.seconds, 1e-9)
    left = progress.seconds * (1 / max(share, 1e-9) - 1)
    return (
        f"{share:6.1%}  {progress.tokens / 1e6:.2f}M tokens  {speed:,.0f}/s  KL {kl:.4f}  MSE {mse:.4f}  "
        f"{left / 60:.1f} min left"
    )
