"""The listener passes each piece of text to the caller as the engine makes it, and counts the tokens passed per row."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial

from complete_fn.planning import BatchPlan
from complete_fn.types import Usage

# Called on another thread with (row, new piece of text, tokens so far). Rows with known answers are not told.
Tell = Callable[[int, str, Usage], None]


class Listener:
    """Passes pieces of answers to a caller that reads rows while they are computed. The engine's threads call it.

    Args:
        tell: The caller's function; None if the caller reads only whole answers.
    """

    def __init__(self, tell: Tell | None, plan: BatchPlan) -> None:
        self.tell, self.plan = tell, plan
        self.lock = threading.Lock()
        self.told: dict[int, Usage] = {}  # tokens so far of the prompts under way whose text the caller reads already
        self.is_silent = False

    def teller(self, number: int) -> Callable[[str, Usage], None] | None:
        """The function that passes on the text of a distinct prompt, for all its rows; None if nobody listens."""
        if self.tell is None:
            return None
        return partial(self.tell_rows, self.tell, number, self.plan.rows_of(number))

    def tell_rows(self, tell: Tell, number: int, rows: list[int], piece: str, usage: Usage) -> None:
        with self.lock:
            if self.is_silent:
                return
            self.told[number] = usage
            for row in rows:
                tell(row, piece, usage)

    def forget(self, number: int) -> None:
        """Forget a prompt whose answer is complete: it is billed as an answer, not as the text told so far."""
        self.told.pop(number, None)

    def silence(self) -> dict[int, Usage]:
        """Stop passing text on, so that the caller reads nothing unbilled.

        Returns:
            The tokens told so far of each prompt under way.
        """
        with self.lock:
            self.is_silent = True
            return dict(self.told)
