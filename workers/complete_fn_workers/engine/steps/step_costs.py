"""`StepCosts` learns the seconds of a FLOP, of a byte read, and of a step, by a fit to the steps seen.

Counting tokens would charge all tokens alike. But a prompt token of a SwiftKV model passes half the layers, each token
of a long context costs more, and a step that only decodes waits for memory.
"""

from __future__ import annotations

import math
from collections import deque

import numpy as np

from complete_fn.capacity.decoder_work import DecoderWork
from complete_fn.history.least_squares import nonnegative

BALANCE = 50.0  # FLOPs that a device does while it reads a byte; assumed before steps are measured
REMEMBERED, REFIT = 512, 64  # steps kept for the fit, and new steps after which it is repeated
TRUST = 0.00001  # weight of BALANCE relative to the steps
LEAST = 0.001  # lower bound of each cost, as a share of BALANCE's, because no computation is free


class StepCosts:
    """Seconds of a FLOP, of a byte read from the cache, and of a step, by least squares of the steps' relative errors.

    Every cost is above 0. Before steps are seen the costs are those of a device with `BALANCE`, which later keeps a
    small weight.
    """

    def __init__(self, decoder: DecoderWork) -> None:
        self.decoder = decoder
        self.likely = np.array([1.0, BALANCE, BALANCE * decoder.weights])  # seconds of a device of 1 FLOP/s
        self.costs: tuple[float, float, float] = tuple(self.likely.tolist())
        self.steps: deque[tuple[float, float, float]] = deque(maxlen=REMEMBERED)
        self.unseen = 0

    def share(self, work: list[tuple[float, float]]) -> list[float]:
        """The cost of each row of a step, in proportion. The cost of the step itself is divided equally."""
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
