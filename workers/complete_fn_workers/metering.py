"""Device time: the wall time of every engine step, divided among the rows that were computed in it, and the rest."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from complete_fn_workers.step_work import Shape, StepCosts

Charge = tuple[float, float]  # device-seconds, those of them for the prompt
NOTHING = (0.0, 0.0)


@dataclass(slots=True)
class Metered:
    """A row in the engine: vLLM's request and prefill counts, tokens seen so far, device-seconds charged so far, and
    those of them for its prompt."""

    request: Any
    prefill: Any
    computed: int = 0
    seconds: float = 0.0
    prompt_seconds: float = 0.0


class StepMeter:
    """Charges each step to its rows by what they computed in it (`step_work`): of the prompt what was not cached, and
    output.

    Conservation: `metered` is the time since the engine was loaded, times the devices. It is the charges of the rows
    that were answered, of those under way, of those given up (`lost`), and `idle`: all that was in no row's step.
    """

    def __init__(self, requests: Any, shape: Shape, devices: int = 1) -> None:
        """Args: requests: vLLM's scheduler's, by its own ids."""
        self.requests, self.devices = requests, devices
        self.costs = StepCosts(shape)
        self.rows: dict[str, Metered] = {}
        self.loaded = time.monotonic()
        self.charged = self.lost = 0.0
        self.told_idle = self.told_lost = 0.0

    def admit(self, key: str, internal_id: str, spent: Charge = NOTHING) -> None:
        """Args: spent: what the row was charged for requests before this one."""
        request = self.requests[internal_id]
        self.rows[key] = Metered(request, request.prefill_stats, 0, *spent)

    def stepped(self, seconds: float) -> None:
        """A request's counter jumps over what was cached, and falls back when it is preempted."""
        rows: list[tuple[Metered, bool]] = []
        work: list[tuple[float, float]] = []
        shape = self.costs.shape
        for row in self.rows.values():
            before, now = row.computed, row.request.num_computed_tokens
            if before == 0 and now:
                before = row.prefill.num_cached_tokens
            if now > before:
                rows.append((row, before < row.request.num_prompt_tokens))
                work.append(shape.work(before, now, row.request.num_prompt_tokens))
            row.computed = now
        if not rows:
            return
        shares = self.costs.share(work)
        whole = seconds * self.devices / sum(shares)
        for (row, of_prompt), share in zip(rows, shares, strict=True):
            row.seconds += whole * share
            if of_prompt:
                row.prompt_seconds += whole * share
        self.charged += seconds * self.devices
        self.costs.learn(seconds, work)

    def leave(self, key: str) -> Charge:
        """What a row that is done was charged."""
        row = self.rows.pop(key)
        return row.seconds, row.prompt_seconds

    def give_up(self, key: str) -> None:
        seconds, _ = self.leave(key)
        self.lost += seconds

    def tell(self) -> list[float]:
        """[`metered` so far, `idle` since it was last told, `lost` likewise]: every second is told once."""
        metered = (time.monotonic() - self.loaded) * self.devices
        idle, lost = metered - self.charged - self.told_idle, self.lost - self.told_lost
        self.told_idle += idle
        self.told_lost = self.lost
        return [metered, idle, lost]
