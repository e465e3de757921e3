"""`StepMeter` divides each step's wall time among the rows computed in it. All other time is idle."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, NamedTuple

from complete_fn.capacity.decoder_work import DecoderWork
from complete_fn_workers.engine.steps.step_costs import StepCosts
from complete_fn_workers.engine.vllm_internals import cached_tokens, computed_tokens, prefill_of, prompt_tokens

Charge = tuple[float, float]  # device-seconds, and the part of them for the prompt
NOTHING = (0.0, 0.0)


@dataclass(slots=True)
class MeteredRow:
    """A row in the engine.

    Attributes:
        request, prefill: vLLM's request and its prefill counts.
        computed: tokens computed up to the last step.
        seconds, prompt_seconds: device-seconds charged so far, and the part of them for the prompt.
        answered, given_up: how the row has left the engine.
    """

    request: Any
    prefill: Any
    computed: int = 0
    seconds: float = 0.0
    prompt_seconds: float = 0.0
    answered: bool = False
    given_up: bool = False


class StepPart(NamedTuple):
    """A row's part of a step: whether it was part of the prompt, and its (FLOPs, bytes)."""

    row: MeteredRow
    of_prompt: bool
    work: tuple[float, float]


class StepMeter:
    """Charges each step to its rows by their work in it (`step_costs`): uncached prompt tokens, and output tokens.

    Conservation: `metered`, the time since the engine was loaded times the number of devices, is the sum of the charges
    of answered rows, of rows under way, of aborted rows (`lost`), and of `idle`, the time outside of steps.
    """

    def __init__(self, requests: Any, decoder: DecoderWork, devices: int = 1, overlaps: bool = False) -> None:
        """Args:
        requests: vLLM's requests, by its own ids (`vllm_internals.requests_under_way`).
        overlaps: whether vLLM schedules asynchronously. Then a call counts and launches its batch, and waits for the
            batch before.
        """
        self.requests, self.devices, self.overlaps = requests, devices, overlaps
        self.launched: list[StepPart] = []  # launched, not yet waited for
        self.costs = StepCosts(decoder)
        self.rows: dict[str, MeteredRow] = {}
        self.loaded = time.monotonic()
        self.charged = self.lost = 0.0
        self.told_idle = self.told_lost = 0.0

    def admit(self, key: str, internal_id: str, spent: Charge = NOTHING) -> None:
        """Args: spent: the row's charge for its requests before this one."""
        request = self.requests[internal_id]
        self.rows[key] = MeteredRow(request, prefill_of(request), 0, *spent)

    def stepped(self, seconds: float) -> None:
        """Charge a step. Call this after each call of the engine's step."""
        batch, learns = self.computed(), True
        if self.overlaps:
            before, self.launched = self.launched, batch
            # If a row of that batch is still here, the engine has not paused, so the call did wait for the batch.
            learns = any(not (row.answered or row.given_up) for row, _, _ in before)
            if any(not row.answered for row, _, _ in before):
                batch = before
        if batch:
            self.charge(seconds, batch)
            if learns:
                self.costs.learn(seconds, [part.work for part in batch])

    def computed(self) -> list[StepPart]:
        """The parts computed since the last call; if steps overlap, the parts launched since then.

        A request's counter jumps over cached tokens, and falls back when the request is preempted.
        """
        batch = []
        for row in self.rows.values():
            before, now, of_prompt = row.computed, computed_tokens(row.request), prompt_tokens(row.request)
            if before == 0 and now:
                before = cached_tokens(row.prefill)
            if now > before:
                work = self.costs.decoder.work(before, now, of_prompt)
                batch.append(StepPart(row, before < of_prompt, work))
            row.computed = now
        return batch

    def charge(self, seconds: float, batch: list[StepPart]) -> None:
        """Divide a step's time. The batch's other rows pay for work launched for a row that already has its answer."""
        shares = self.costs.share([part.work for part in batch])
        paying = [(part, share) for part, share in zip(batch, shares, strict=True) if not part.row.answered]
        whole = seconds * self.devices / sum(share for _, share in paying)
        for (row, of_prompt, _), share in paying:
            row.seconds += whole * share
            if of_prompt:
                row.prompt_seconds += whole * share
            if row.given_up:
                self.lost += whole * share
        self.charged += seconds * self.devices

    def leave(self, key: str) -> Charge:
        """Remove a finished row. Returns its charge."""
        row = self.rows.pop(key)
        row.answered = True
        return row.seconds, row.prompt_seconds

    def give_up(self, key: str) -> None:
        """Remove an aborted row. Its charge is lost, and so is the time of work still under way for it."""
        row = self.rows.pop(key)
        row.given_up = True
        self.lost += row.seconds

    def tell(self) -> list[float]:
        """[`metered` so far, `idle` and `lost` since the last call]: each second is reported once."""
        metered = (time.monotonic() - self.loaded) * self.devices
        idle, lost = metered - self.charged - self.told_idle, self.lost - self.told_lost
        self.told_idle += idle
        self.told_lost = self.lost
        return [metered, idle, lost]
