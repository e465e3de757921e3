"""What the tokens of an engine step cost: FLOPs and bytes by the model's shape, their seconds fitted to the steps.

A prompt token of a SwiftKV model passes half the layers, a long context costs each of its tokens more, and a step that
only decodes waits for memory: tokens alone would charge all of them alike.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np

from complete_fn.history.least_squares import nonnegative
from complete_fn_workers.swiftkv.serving.flops import head_size, layer_flops, skipped_share

BALANCE = 50.0  # FLOPs that a device does while it reads a byte, before anything is measured
REMEMBERED, REFIT = 512, 64  # steps
TRUST = 0.00001  # weight of BALANCE against the steps
LEAST = 0.001  # of what BALANCE says, whatever the steps seem to say: nothing that is computed is free


@dataclass(frozen=True)
class Shape:
    """What a decoder takes for a token, at 2 FLOPs a multiply-add.

    With d the width, dq = heads x head size, kv = key-value heads x head size, ff the MLP's width, and V words, a layer
    takes QO = 4 d dq, KV = 4 d kv, MLP = 6 d ff, attention 4 dq for each token before; lm_head takes 2 d V. Of a prompt
    SwiftKV skips a part (`swiftkv.flops`). A mixture of experts counts as a dense model of the width it states.

    Attributes:
        prompt, output: FLOPs of the matrices for a token of the prompt, of the answer (with lm_head).
        attend_prompt, attend_output: FLOPs for each token before it.
        kv: bytes read for each token of the context of a decoded token.
        weights: bytes of the matrices, read in every step.
    """

    prompt: float
    output: float
    attend_prompt: float
    attend_output: float
    kv: float
    weights: float

    @classmethod
    def of(cls, config: Any, item: int = 2, kv_item: int = 2) -> Shape:
        """One token like any other where the model is no decoder of equal layers.

        Args:
            config: transformers' of the text model.
            item, kv_item: bytes of a weight, of a cached number.
        """
        try:
            return cls.of_layers(config, item, kv_item)
        except (AttributeError, TypeError, ZeroDivisionError):
            return cls(1.0, 1.0, 0.0, 0.0, 0.0, 0.0)

    @classmethod
    def of_layers(cls, config: Any, item: int, kv_item: int) -> Shape:
        """Raises:
        AttributeError, TypeError, ZeroDivisionError: the config says nothing of heads, or no one width for all layers.
        """
        layer, kv = layer_flops(config)
        width, heads, layers = config.hidden_size, config.num_attention_heads, config.num_hidden_layers
        matrices, words = layers * layer, 2 * width * config.vocab_size
        attend, skipped = 4 * heads * head_size(config), skipped_share(config)
        attending = config.num_key_value_layers if skipped else layers
        return cls(
            prompt=matrices * (1 - skipped),
            output=matrices + words,
            attend_prompt=attend * attending,
            attend_output=attend * layers,
            kv=kv / (2 * width) * layers * kv_item,
            weights=(matrices + words) / 2 * item,
        )

    def work(self, before: int, now: int, prompt_tokens: int) -> tuple[float, float]:
        """(FLOPs, bytes of the cache) of a row's tokens from the `before`-th to the `now`-th."""
        ahead = max(0, min(now, prompt_tokens) - before)
        written = now - before - ahead
        flops = ahead * self.prompt + self.attend_prompt * (ahead * before + ahead * (ahead + 1) / 2)
        if before < prompt_tokens <= now:  # the last token of the prompt passes all layers, and gives the first word
            flops += self.output - self.prompt
        flops += written * (self.output + self.attend_output * now)
        return flops, written * now * self.kv


class StepCosts:
    """Seconds of a FLOP, of a byte of the cache and of a step as such, by least squares of the steps' relative errors.

    None is 0 or below. Until steps have been seen, and a little ever after, they are what a device of `BALANCE` takes.
    """

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.likely = np.array([1.0, BALANCE, BALANCE * shape.weights])  # seconds of a device of 1 FLOP/s
        self.costs: tuple[float, float, float] = tuple(self.likely.tolist())
        self.steps: deque[tuple[float, float, float]] = deque(maxlen=REMEMBERED)
        self.unseen = 0

    def share(self, work: list[tuple[float, float]]) -> list[float]:
        """What each row of a step takes, in proportion; a step as such costs all its rows alike."""
        flop, byte, step = self.costs
        return [flop * flops + byte * read + step / len(work) for flops, read in work]

    def learn(self, seconds: float, work: list[tuple[float, float]]) -> None:
        if seconds <= 0:
            return
        self.steps.append((sum(flops for flops, _ in work), sum(read for _, read in work), seconds))
        self.unseen += 1
        if self.unseen >= REFIT:
            self.unseen = 0
            self.fit()

    def fit(self) -> None:
        seen = np.array(self.steps)
        amounts = np.column_stack([seen[:, :2], np.ones(len(seen))])
        likely = self.likely * float(np.median(seen[:, 2] / (amounts @ self.likely)))
        scaled = amounts * likely / seen[:, 2:] / math.sqrt(len(seen))
        pull = math.sqrt(TRUST)
        target = np.append(np.full(len(seen), 1 / math.sqrt(len(seen))), np.full(3, pull))
        factors = np.maximum(nonnegative(np.vstack([scaled, pull * np.eye(3)]), target), LEAST)
        flop, byte, step = (likely * factors).tolist()
        self.costs = flop, byte, step
