"""THE MAIN PATH: `run()` turns a column of prompts into a column of answers. Everything else only calls it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial

from complete_fn.engines.base import Engine
from complete_fn.engines.call import Call
from complete_fn.engines.tokenizer import token_sizes
from complete_fn.errors import EngineError
from complete_fn.execution.answers import Answers
from complete_fn.execution.commits import Slices
from complete_fn.execution.run_state import Work, known_answers
from complete_fn.execution.summary import summarise
from complete_fn.history.device_time import device_time_of
from complete_fn.history.run_history import Meter, device_of, keep
from complete_fn.planning import make_plan
from complete_fn.progress import Progress, Quiet
from complete_fn.prompts.options import CacheMode
from complete_fn.spending.budget import NO_BRAKE, Brake, Budget, Caps
from complete_fn.spending.token_bound import PromptBound
from complete_fn.store.store import LOOK_UP, Store
from complete_fn.types import Asker, Completion, CompletionRequest, Usage

ADMIT = 128  # rows noted in the store as handed to the engine at a time
LOOK_SECONDS, LOOKS_TO_DROP = 0.1, 20  # how often to look for answers that other runs compute; for runs that died
Tell = Callable[[int, str, Usage], None]  # (row, new piece, tokens so far) on another thread; not of known answers
LEFT = "Whoever read the answer left before its end."
NOT_TEXT = "The prompt has a lone surrogate or bytes that are not UTF-8, which no tokenizer takes."


@dataclass(frozen=True)
class Tools:
    """What a run works with. `budget` caps its money, `tokens` its tokens of prompts and answers, `brake` both.

    `pause` waits so many seconds for other runs, and raises what is to end this one.
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


def run(call: Call, prompts: object, tools: Tools, who: Asker, cache: CacheMode = "on") -> Answers:
    """Answer every prompt: plan, look up what is known, run the rest, commit slice by slice, back in row order.

    Args:
        prompts: Arrow array or chunked array of strings; NULL stays NULL, messages as `pack_messages` packs them.

    Raises:
        EngineError: the engine cannot do the work; committed slices stay.
        StoreError: a slice cannot be committed.
    """
    began = time.monotonic()
    plan = make_plan(prompts, mergeable=call.sampling.greedy, sizes=token_sizes(call.model))
    work = known_answers(call, plan, tools.store, who, cache)
    tools.progress.start(len(plan.order))
    try:
        with Slices(call, work, tools.store, who, tools.progress, device_time_of(tools.engine)) as slices:
            budget = None if tools.budget is None else tools.budget.for_attempt(slices.attempt)
            slices.reuse(work.reused)
            missing = work.missing()
            while missing:
                elsewhere = compute(missing, call, work, slices, replace(tools, budget=budget), who)
                missing = unanswered(elsewhere, work, slices, tools)
    finally:
        tools.progress.stop()
    return Answers(plan, work.completions, call.model.prices, summarise(call, work, time.monotonic() - began))


def compute(numbers: list[int], call: Call, work: Work, slices: Slices, tools: Tools, who: Asker) -> list[int]:
    """Stream the distinct prompts through the engine; what the budget refuses waits for money to come back.

    Returns:
        The prompts that other runs are computing.
    """
    elsewhere: list[int] = []
    bound, caps = PromptBound(call.model), Caps(call.model.prices, tools.budget, tools.tokens, tools.brake)
    meter = Meter()
    while numbers:
        turn = numbers if not caps or bound.known else numbers[:1]
        admission = Admission(call, work, slices, tools, caps, bound, meter)
        stream = tools.engine.stream(admission.requests(turn), who.tenant)
        try:
            for position, completion in stream:
                number = admission.sent[position]
                slices.add(number, admission.settled(number, completion))
        except BaseException as error:
            if not isinstance(error, Exception):  # whoever asked has stopped it, and has read what was told
                admission.bill_told()
            raise
        finally:
            close(stream)
            slices.flush()
            admission.return_unsettled()
        admission.check_complete()
        if tools.budget is not None:
            tools.budget.release()
        again = refuse_hopeless(admission.refused, slices, caps)
        if len(again) == len(turn):
            tools.pause(0.05)  # another run holds the reservations
        numbers = numbers[len(turn) :] + again
        elsewhere += admission.elsewhere
    if (past := meter.run(call, work.plan, device_of(tools.engine))) is not None:
        keep(tools.store, who.tenant, call.model.name, past)
    return elsewhere


def unanswered(numbers: list[int], work: Work, slices: Slices, tools: Tools) -> list[int]:
    """Wait until other runs have answered these prompts or let them go; returns the latter, to be computed here."""
    free: list[int] = []
    for low in range(0, len(numbers), LOOK_UP):
        waiting = numbers[low : low + LOOK_UP]
        asked = 0
        while waiting:
            claimed = tools.store.claimed(slices.attempt.tenant, [work.keys[n] for n in waiting])
            found = work.look_again(waiting, tools.store)  # after: what was let go with its answer is found
            slices.reuse(found)
            free += [n for n in waiting if n not in found and work.keys[n] not in claimed]
            waiting = [n for n in waiting if n not in found and work.keys[n] in claimed]
            if waiting:
                asked += 1
                if asked % LOOKS_TO_DROP == 0:
                    tools.store.drop_claims()
                tools.pause(LOOK_SECONDS)
    return free


class Admission:
    """Hands prompts to the engine as it draws them, each within the caps; remembers what was sent."""

    def __init__(
        self, call: Call, work: Work, slices: Slices, tools: Tools, caps: Caps, bound: PromptBound, meter: Meter
    ) -> None:
        self.call, self.work, self.slices, self.caps, self.bound = call, work, slices, caps, bound
        self.priority, self.tell, self.meter = tools.priority, tools.tell, meter
        self.sent: list[int] = []
        self.elsewhere: list[int] = []
        self.answered = 0
        self.refused: dict[int, Usage] = {}
        self.held: dict[int, Usage] = {}
        self.telling = threading.Lock()
        self.told: dict[int, Usage] = {}  # of rows under way of which somebody has read something
        self.silent = False

    def requests(self, numbers: list[int]) -> Iterator[CompletionRequest]:
        call = self.call
        for low in range(0, len(numbers), ADMIT):
            chosen = numbers[low : low + ADMIT]
            admitted = [(n, t) for n, t in self.work.texts(chosen) if self.sendable(n, t) and self.affordable(n, t)]
            mine = self.slices.admit([n for n, _ in admitted])
            for number, text in admitted:
                if number not in mine:
                    self.leave(number)
                    continue
                self.sent.append(number)
                self.meter.draw()
                prompt, tell = self.work.prompt(number, text), self.teller(number)
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
        """To the run that is computing it."""
        self.elsewhere.append(number)
        if (worst := self.held.pop(number, None)) is not None:
            self.caps.settle(worst, Usage())

    def teller(self, number: int) -> Callable[[str, Usage], None] | None:
        """Tells the rows of a distinct prompt, if anybody listens."""
        if self.tell is None:
            return None
        return partial(self.tell_rows, self.tell, number, self.work.plan.rows_of(number))

    def tell_rows(self, tell: Tell, number: int, rows: list[int], piece: str, usage: Usage) -> None:
        with self.telling:
            if self.silent:
                return
            self.told[number] = usage
            for row in rows:
                tell(row, piece, usage)

    def bill_told(self) -> None:
        """Rows whose beginning was told end here, at the price of their prompt and of what was told."""
        with self.telling:
            self.silent = True  # so that nothing is read that is not billed
        for number, usage in list(self.told.items()):
            self.slices.add(number, self.settled(number, replace(Completion.failed("cancelled", LEFT), usage=usage)))

    def sendable(self, number: int, text: str) -> bool:
        try:
            text.encode()
        except UnicodeEncodeError:
            self.slices.add(number, Completion.failed("invalid_request", NOT_TEXT))
            return False
        return True

    def affordable(self, number: int, text: str) -> bool:
        if not self.caps:
            return True
        answer = self.call.sampling.max_tokens or self.call.model.default_max_tokens
        worst = Usage(self.bound.of(text), 0, answer)
        if not self.caps.reserve(worst):
            self.refused[number] = worst
            return False
        self.held[number] = worst
        return True

    def settled(self, number: int, completion: Completion) -> Completion:
        self.answered += 1
        self.told.pop(number, None)
        self.meter.add(completion.usage)
        worst = self.held.pop(number, None)
        if worst is not None:
            self.caps.settle(worst, completion.usage)
            self.bound.learn(completion.usage)
        return storable(completion)

    def check_complete(self) -> None:
        if self.answered < len(self.sent):
            lost = len(self.sent) - self.answered
            raise EngineError(f"The engine ended its stream with {lost} of {len(self.sent)} rows unanswered.")

    def return_unsettled(self) -> None:
        for worst in self.held.values():
            self.caps.settle(worst, Usage())
        self.held.clear()


def refuse_hopeless(refused: dict[int, Usage], slices: Slices, caps: Caps) -> list[int]:
    """Fail the rows that nothing given back can make room for; returns those that may be tried again."""
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


def is_utf8(text: str | None) -> bool:
    try:
        (text or "").encode()
    except UnicodeEncodeError:
        return False
    return True


def without_surrogates(text: str) -> str:
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def close(stream: Iterable[object]) -> None:
    if isinstance(stream, Iterator) and hasattr(stream, "close"):
        stream.close()
