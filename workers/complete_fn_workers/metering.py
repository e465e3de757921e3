"""Device time: the wall time of every engine step, divided among the rows that computed tokens in it, and the rest."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any


@dataclass(slots=True)
class Metered:
    """A row in the engine: vLLM's request and prefill counts, tokens seen so far, device-seconds charged so far."""

    request: Any
    prefill: Any
    computed: int = 0
    seconds: float = 0.0


class StepMeter:
    """Charges each step to its rows by the tokens that they computed: of the prompt what was not cached, and output.

    Tokens, not fitted weights of prefill and decode: within one step every computed token passes the same matrices, so
    its share of their FLOPs is equal, and in a step of decoding only, so is its share of reading the weights. What
    this leaves out is each row's own attention (a long context costs more than its share) and that a prompt token of
    a mixed step waits less on memory than a decoded one; both vanish where the linear layers dominate.

    Conservation: `metered` is the time since the engine was loaded, times the devices. It is the charges of the rows
    that were answered, of those under way, of those given up (`lost`), and `idle`: all that was in no row's step.
    """

    def __init__(self, requests: Any, devices: int = 1) -> None:
        """Args: requests: vLLM's scheduler's, by its own ids."""
        self.requests, self.devices = requests, devices
        self.rows: dict[str, Metered] = {}
        self.loaded = time.monotonic()
        self.charged = self.lost = 0.0
        self.told_idle = self.told_lost = 0.0

    def admit(self, key: str, internal_id: str, spent: float = 0.0) -> None:
        """Args: spent: what the row was charged for requests before this one."""
        request = self.requests[internal_id]
        self.rows[key] = Metered(request, request.prefill_stats, 0, spent)

    def stepped(self, seconds: float) -> None:
        """A request's counter jumps over what was cached, and falls back when it is preempted."""
        work: list[tuple[Metered, int]] = []
        for row in self.rows.values():
            now = row.request.num_computed_tokens
            new = now - row.computed
            if row.computed == 0 and new:
                new -= row.prefill.num_cached_tokens
            if new > 0:
                work.append((row, new))
            row.computed = now
        tokens = sum(new for _, new in work)
        for row, new in work:
            row.seconds += seconds * self.devices * new / tokens
        if work:
            self.charged += seconds * self.devices

    def leave(self, key: str) -> float:
        """Device-seconds of a row that is done."""
        return self.rows.pop(key).seconds

    def give_up(self, key: str) -> None:
        self.lost += self.leave(key)

    def tell(self) -> list[float]:
        """[`metered` so far, `idle` since it was last told, `lost` likewise]: every second is told once."""
        metered = (time.monotonic() - self.loaded) * self.devices
        idle, lost = metered - self.charged - self.told_idle, self.lost - self.told_lost
        self.told_idle += idle
        self.told_lost = self.lost
        return [metered, idle, lost]
