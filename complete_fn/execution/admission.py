"""Admission lets rows through to the engine one by one, as far as the caps allow."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from complete_fn.engines.base import Engine
from complete_fn.engines.call import Call
from complete_fn.errors import EngineError, UsageRefusedError
from complete_fn.execution.commits import Slices
from complete_fn.execution.listener import Listener, Tell
from complete_fn.execution.run_state import Work
from complete_fn.history.run_history import Meter
from complete_fn.progress import Progress, Quiet
from complete_fn.spending.budget import NO_BRAKE, Brake, Budget, Caps
from complete_fn.store.store import Store
from complete_fn.text import is_utf8, without_surrogates
from complete_fn.types import Completion, CompletionRequest, RowError, Usage

ADMIT = 128  # rows that one store transaction notes as handed to the engine
MOST_TOKENS = 100_000_000  # tokens believed of one row's prompt or answer, so that sums fit into the store's 64 bits
LEFT = "Whoever read the answer left before its end."
NOT_TEXT = "The prompt has a lone surrogate or bytes that are not UTF-8, which no tokenizer takes."


@dataclass(frozen=True)
class Tools:
    """The tools of a run. `budget` caps its money, `tokens` the tokens of prompts and answers; `brake` has more caps.

    `pause` waits so many seconds for other runs. If this run is stopped meanwhile, it raises the error that ends it.
    """

    engine: Engine
    store: Store
    budget: Budget | None = None
    progress: Progress = Quiet()
    tokens: Budget | None = None
    brake: Brake = NO_BRAKE
    priority: int = 0
    tell: Tell | None = None
    pause: Callable[[float], None] = time.sleep


class Admission:
    """Hands prompts to the engine as it draws them, each within the caps; remembers which prompts it has sent."""

    def __init__(self, call: Call, work: Work, slices: Slices, tools: Tools, caps: Caps, meter: Meter) -> None:
        self.call, self.work, self.slices, self.caps, self.meter = call, work, slices, caps, meter
        self.priority, self.listener = tools.priority, Listener(tools.tell, work.plan)
        self.sent: list[int] = []
        self.noted: set[int] = set()  # prompts that the store counts as handed to the engine
        self.elsewhere: list[int] = []
        self.answered = 0
        self.refused: dict[int, Usage] = {}
        self.held: dict[int, Usage] = {}
        self.longest = call.sampling.max_tokens or call.model.default_max_tokens
        self.is_bounded = call.sampling.max_tokens is not None or bool(caps)
        self.refusal: RowError | None = None

    def requests(self, numbers: list[int]) -> Iterator[CompletionRequest]:
        call = self.call
        for low in range(0, len(numbers), ADMIT):
            chosen = numbers[low : low + ADMIT]
            admitted = [(n, t) for n, t in self.work.texts(chosen) if self.sendable(n, t) and self.affordable(n, t)]
            mine = self.slices.admit([n for n, _ in admitted])
            self.noted |= mine
            for number, text in admitted:
                if self.refusal is not None and self.caps:
                    return  # rows under way are still answered, because the endpoint bills them
                if number not in mine:
                    self.leave(number)
                    continue
                self.sent.append(number)
                self.meter.draw()
                prompt, tell = self.work.prompt(number, text), self.listener.teller(number)
                yield CompletionRequest(
                    call.model.name,
                    prompt,
                    call.sampling,
                    call.response_format,
                    self.priority,
                    tell,
                    call.choices,
                )

    def leave(self, number: int) -> None:
        """Skip the prompt: another run is already computing it."""
        self.elsewhere.append(number)
        if (worst := self.held.pop(number, None)) is not None:
            self.caps.settle(worst, Usage())

    def bill_told(self) -> None:
        """End the rows of which the caller has read a beginning; their prompt and the text read are billed."""
        for number, usage in self.listener.silence().items():
            self.slices.add(number, self.settled(number, replace(Completion.failed("cancelled", LEFT), usage=usage)))

    def sendable(self, number: int, text: str) -> bool:
        if is_utf8(text):
            return True
        self.slices.add(number, Completion.failed("invalid_request", NOT_TEXT))
        return False

    def affordable(self, number: int, text: str) -> bool:
        if not self.caps:
            return True
        worst = Usage(self.caps.bound.of(text), 0, self.longest)
        if not self.caps.reserve(worst):
            self.refused[number] = worst
            return False
        self.held[number] = worst
        return True

    def settled(self, number: int, completion: Completion) -> Completion:
        self.answered += 1
        self.listener.forget(number)
        worst = self.held.pop(number, None)
        completion = self.within_what_was_asked(number, completion, worst)
        self.meter.add(completion.usage)
        if worst is not None:
            self.caps.settle(worst, completion.usage)
            self.caps.bound.learn(completion.usage)
        return storable(completion)

    def within_what_was_asked(self, number: int, completion: Completion, worst: Usage | None) -> Completion:
        """The completion; with a row error instead of its text if the endpoint reports more tokens than were asked for.

        The first row shows how many tokens an endpoint's chat template adds. So its prompt may have more tokens than
        expected, as long as the caps cover them.
        """
        usage = completion.usage
        longest = self.longest if self.is_bounded else MOST_TOKENS
        is_kept = usage.prompt_tokens <= MOST_TOKENS and usage.completion_tokens <= longest
        if is_kept and worst is not None and usage.prompt_tokens > worst.prompt_tokens:
            is_kept = not self.caps.bound.known and self.caps.hold(worst, usage)
        if is_kept:
            return completion
        if worst is None:
            ((_, text),) = self.work.texts([number])
            worst = Usage(self.caps.bound.of(text), 0, self.longest)
        self.refusal = RowError(
            "usage_refused",
            f"The endpoint reports {usage.prompt_tokens} tokens of prompt and {usage.completion_tokens} of answer; at "
            f"most {worst.prompt_tokens} and {worst.completion_tokens} were asked for.",
        )
        billed = replace(
            usage,
            prompt_tokens=min(usage.prompt_tokens, worst.prompt_tokens),
            cached_tokens=min(usage.cached_tokens, usage.prompt_tokens, worst.prompt_tokens),
            completion_tokens=min(usage.completion_tokens, worst.completion_tokens),
        )
        return replace(completion, text=None, error=self.refusal, usage=billed)

    def refuse_broken_caps(self) -> None:
        """Raises:
        UsageRefusedError: A row used more than was asked for, and the run has a cap.
        """
        if self.refusal is not None and self.caps:
            raise UsageRefusedError(
                f"{self.refusal.message} With such reports no cap can be kept, so the run stops; its answers are kept."
            )

    def check_complete(self) -> None:
        if self.answered < len(self.sent):
            lost = len(self.sent) - self.answered
            raise EngineError(f"The engine ended its stream with {lost} of {len(self.sent)} rows unanswered.")

    def return_unsettled(self) -> None:
        """Give back what was reserved for rows that have no answer, and the notes of those that were never sent."""
        if unsent := self.noted.difference(self.sent):
            self.slices.withdraw(unsent)
        for worst in self.held.values():
            self.caps.settle(worst, Usage())
        self.held.clear()


def refuse_hopeless(refused: dict[int, Usage], slices: Slices, caps: Caps) -> list[int]:
    """Fail the rows that can never fit into the caps; returns the rows that may be tried again.

    A row may be tried again while rows under way can still return what was reserved for them.
    """
    again = []
    for number, worst in refused.items():
        message = caps.refusal(worst)
        if message is None:
            again.append(number)
            continue
        slices.add(number, Completion.failed("budget_exceeded", message))
    if refused:
        slices.flush()
    return again


def storable(completion: Completion) -> Completion:
    """The completion without lone surrogates, which an endpoint's JSON can hold and no database takes."""
    error = completion.error
    if is_utf8(completion.text) and (error is None or is_utf8(error.message)):
        return completion
    cleaned = None if error is None else replace(error, message=without_surrogates(error.message))
    text = None if completion.text is None else without_surrogates(completion.text)
    return replace(completion, text=text, error=cleaned)
