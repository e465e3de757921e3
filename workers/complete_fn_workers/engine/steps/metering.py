"""Measures device time: each step's wall time is divided among the rows computed in it; all other time is idle."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, NamedTuple

from complete_fn.capacity.decoder_work import DecoderWork
from complete_fn_workers.engine.steps.step_costs import StepCosts
from complete_fn_workers.engine.vllm_internals import cached_tokens, computed_tokens, prefill_of, prompt_tokens

Charge = tuple[float, float]  # device-seconds, those of them for the prompt
NOTHING = (0.0, 0.0)


@dataclass(slots=True)
class MeteredRow:
    """A row in the engine.

    Attributes:
        request, prefill: vLLM's request and its prefill counts.
        computed: tokens seen so far.
        seconds, prompt_seconds: device-seconds charged so far, and those of them for the prompt.
        answered, given_up: how the row left, once it has.
    """

    request: Any
    prefill: Any
    computed: int = 0
    seconds: float = 0.0
    prompt_seconds: float = 0.0
    answered: bool = False
    given_up: bool = False


class StepPart(NamedTuple):
    """A row's part of a step: whether it was of the prompt, and its (FLOPs, bytes)."""

    row: MeteredRow
    of_prompt: bool
    work: tuple[float, float]


class StepMeter:
    """Charges each step to its rows by what they computed in it (`step_costs`): of the prompt what was not cached, and
    output.

    Conservation: `metered` is the time since the engine was loaded, times the devices. It is the sum of the charges of
    answered rows, of rows under way, of aborted rows (`lost`), and of `idle`: the time in no row's step.
    """

    def __init__(self, requests: Any, decoder: DecoderWork, devices: int = 1, overlaps: bool = False) -> None:
        """Args:
        requests: vLLM's, by its own ids (`vllm_internals.requests_under_way`).
        overlaps: vLLM schedules asynchronously: a call counts and launches its batch, then waits for the one before.
        """
        self.requests, self.devices, self.overlaps = requests, devices, overlaps
        self.launched: list[StepPart] = []  # launched, not yet waited for
        self.costs = StepCosts(decoder)
        self.rows: dict[str, MeteredRow] = {}
        self.loaded = time.monotonic()
        self.charged = self.lost = 0.0
        self.told_idle = self.told_lost = 0.0

    def admit(self, key: str, internal_id: str, spent: Charge = NOTHING) -> None:
        """Args: spent: what the row was charged for requests before this one."""
        request = self.requests[internal_id]
        self.rows[key] = MeteredRow(request, prefill_of(request), 0, *spent)

    def stepped(self, seconds: float) -> None:
        """After each call of the engine's step."""
        batch, learns = self.computed(), True
        if self.overlaps:
            before, self.launched = self.launched, batch
            # While a row of it is here, the engine has not paused: the call did wait for that batch.
            learns = any(not (row.answered or row.given_up) for row, _, _ in before)
            if any(not row.answered for row, _, _ in before):
                batch = before
        if batch:
            self.charge(seconds, batch)
            if learns:
                self.costs.learn(seconds, [part.work for part in batch])

    def computed(self) -> list[StepPart]:
        """What was computed or, where steps overlap, launched since the last call.

        A request's counter jumps over what was cached, and falls back when it is preempted.
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
        """Divide a step's time. The other rows of a batch pay for what was launched for a row that has its answer."""
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
        """Take out a finished row; returns its charge."""
        row = self.rows.pop(key)
        row.answered = True
        return row.seconds, row.prompt_seconds

    def give_up(self, key: str) -> None:
        """Take out an aborted row: its charge is lost, as is what is still computed for it."""
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
