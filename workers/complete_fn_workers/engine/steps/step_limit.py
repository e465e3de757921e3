"""`StepLimit` limits the bulk work of an engine step while a chat is open, because the chat waits for running steps."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

STEP_SECONDS = 0.03  # longest wanted step while a chat is open
CHATTING_S = 30.0  # after a chat, the next one is expected within this time
LEARN = 0.1  # weight of the latest step or answer
LEAST_TOKENS = 32  # smaller steps say little about the rate


class StepLimit:
    """Learns the tokens per second from the steps, and from the answers the share of prompts that is not cached.

    Args:
        budget: tokens that the scheduler puts into one step at most.
    """

    def __init__(self, budget: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.budget, self.clock = budget, clock
        self.rate: float | None = None
        self.fresh = 1.0
        self.pending = 0.0  # prompt tokens that were admitted and not yet computed
        self.until = -math.inf
        self.held_back = False  # the last step took on no bulk rows because of a chat

    def chat(self) -> None:
        self.until = self.clock() + CHATTING_S

    def takes_bulk(self, chats: int, running: int) -> bool:
        """Whether the next step takes on bulk rows beside the `running` ones.

        It does not in the first step of a chat, but bulk rows are never held back twice in a row.
        """
        self.held_back = chats > 0 and running > 0 and not self.held_back
        return not self.held_back

    def room(self, decoding: int) -> float:
        """Prompt tokens that may be added to the next step, beside `decoding` rows that get one token each."""
        if self.rate is None or self.clock() > self.until:
            return math.inf
        return self.rate * STEP_SECONDS - decoding - self.pending

    def admit(self, prompt_tokens: int) -> None:
        self.pending += prompt_tokens * self.fresh

    def stepped(self, seconds: float, decoding: int) -> None:
        """Note the end of a step, with `decoding` rows in it beside the new ones."""
        computed = min(self.pending, max(0, self.budget - decoding))
        self.pending -= computed
        tokens = computed + decoding
        if tokens >= LEAST_TOKENS and seconds > 0:
            seen = tokens / seconds
            self.rate = seen if self.rate is None else self.rate + LEARN * (seen - self.rate)

    def finished(self, prompt_tokens: int, cached_tokens: int) -> None:
        self.fresh += LEARN * ((prompt_tokens - cached_tokens) / max(1, prompt_tokens) - self.fresh)
