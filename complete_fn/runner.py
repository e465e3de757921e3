"""THE MAIN PATH: `run()` turns a column of prompts into a column of answers. Everything else only calls it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from decimal import Decimal

from complete_fn.answers import Answers
from complete_fn.budget import Budget
from complete_fn.claims import CLAIMS
from complete_fn.engine import Engine
from complete_fn.errors import EngineError
from complete_fn.keys import Call
from complete_fn.options import CacheMode
from complete_fn.plan import make_plan
from complete_fn.prices import amount, worst_case
from complete_fn.progress import Progress, Quiet
from complete_fn.prompt_bound import PromptBound
from complete_fn.prompts import unpack
from complete_fn.slices import Slices
from complete_fn.store import Store
from complete_fn.summary import summarise
from complete_fn.types import Asker, Completion, CompletionRequest
from complete_fn.work import Work, known_answers

ADMIT = 128  # rows noted in the store as handed to the engine at a time
NOT_TEXT = "The prompt has a lone surrogate or bytes that are not UTF-8, which no tokenizer takes."


@dataclass(frozen=True)
class Tools:
    """What a run works with."""

    engine: Engine
    store: Store
    budget: Budget | None = None
    progress: Progress = Quiet()


def run(call: Call, prompts: object, tools: Tools, who: Asker, cache: CacheMode = "on") -> Answers:
    """Answer every prompt: plan, look up what is known, run the rest, commit slice by slice, back in row order.

    Args:
        prompts: Arrow array or chunked array of strings; NULL stays NULL, messages as `pack_messages` packs them.

    Raises:
        EngineError: the engine cannot do the work; committed slices stay.
        StoreError: a slice cannot be committed.
    """
    began = time.monotonic()
    plan = make_plan(prompts, mergeable=call.sampling.greedy)
    seen = CLAIMS.releases
    work = known_answers(call, plan, tools.store, who, cache)
    tools.progress.start(len(plan.order))
    try:
        with Slices(call, work, tools.store, who, tools.progress) as slices:
            slices.reuse(work.reused)
            while missing := work.missing():
                with claimed(work, missing, who.tenant) as (mine, theirs):
                    if work.shared and CLAIMS.releases != seen:  # committed between our look-up and our claim
                        slices.reuse(work.look_again(mine, tools.store))
                    mine = [n for n in mine if work.found[n] is None]
                    compute(mine, call, work, slices, tools, who)
                wait(theirs)
                slices.reuse(work.look_again(theirs, tools.store))
    finally:
        tools.progress.stop()
    return Answers(plan, work.completions, call.model.prices, summarise(call, work, time.monotonic() - began))


class claimed:
    """Claim the keys of the missing prompts for this run; what another thread computes is left to it."""

    def __init__(self, work: Work, missing: list[int], tenant: str) -> None:
        self.work, self.missing, self.tenant = work, missing, tenant
        self.keys: set[bytes] = set()

    def __enter__(self) -> tuple[list[int], dict[int, threading.Event]]:
        if not self.work.shared:
            return self.missing, {}
        keys = {n: self.work.keys[n] for n in self.missing}
        self.keys, events = CLAIMS.take(self.tenant, keys.values())
        mine = [n for n in self.missing if keys[n] in self.keys]
        return mine, {n: events[k] for n, k in keys.items() if k in events}

    def __exit__(self, *_: object) -> None:
        CLAIMS.release(self.tenant, self.keys)


def compute(numbers: list[int], call: Call, work: Work, slices: Slices, tools: Tools, who: Asker) -> None:
    """Stream the distinct prompts through the engine; what the budget refuses waits for money to come back."""
    bound = PromptBound(call.model)
    while numbers:
        turn = numbers if tools.budget is None or bound.known else numbers[:1]
        admission = Admission(call, work, slices, tools.budget, bound)
        stream = tools.engine.stream(admission.requests(turn), who.tenant)
        try:
            for position, completion in stream:
                slices.add(admission.sent[position], admission.settled(position, completion))
        finally:
            close(stream)
            slices.flush()
            admission.return_unsettled()
        admission.check_complete()
        again = refuse_hopeless(admission.refused, slices, tools.budget)
        if len(again) == len(turn):
            time.sleep(0.05)  # another thread holds the reservations
        numbers = numbers[len(turn) :] + again


class Admission:
    """Hands prompts to the engine as it draws them, each within the budget; remembers what was sent."""

    def __init__(self, call: Call, work: Work, slices: Slices, budget: Budget | None, bound: PromptBound) -> None:
        self.call, self.work, self.slices, self.budget, self.bound = call, work, slices, budget, bound
        self.sent: list[int] = []
        self.answered = 0
        self.refused: dict[int, Decimal] = {}
        self.held: dict[int, Decimal] = {}

    def requests(self, numbers: list[int]) -> Iterator[CompletionRequest]:
        name, sampling, schema = self.call.model.name, self.call.sampling, self.call.response_format
        for low in range(0, len(numbers), ADMIT):
            chosen = numbers[low : low + ADMIT]
            admitted = [(n, t) for n, t in self.work.texts(chosen) if self.sendable(n, t) and self.affordable(n, t)]
            self.slices.admit([n for n, _ in admitted])
            for number, text in admitted:
                self.sent.append(number)
                yield CompletionRequest(name, unpack(text), sampling, schema)

    def sendable(self, number: int, text: str) -> bool:
        try:
            text.encode()
        except UnicodeEncodeError:
            self.slices.add(number, Completion.failed("invalid_request", NOT_TEXT))
            return False
        return True

    def affordable(self, number: int, text: str) -> bool:
        if self.budget is None:
            return True
        model = self.call.model
        answer = self.call.sampling.max_tokens or model.default_max_tokens
        worst = worst_case(model.prices, self.bound.of(text), answer)
        if not self.budget.reserve(worst):
            self.refused[number] = worst
            return False
        self.held[number] = worst
        return True

    def settled(self, position: int, completion: Completion) -> Completion:
        self.answered += 1
        worst = self.held.pop(self.sent[position], None)
        if self.budget is not None and worst is not None:
            self.budget.settle(worst, amount(self.call.model.prices, completion.usage))
            self.bound.learn(completion.usage)
        return storable(completion)

    def check_complete(self) -> None:
        if self.answered < len(self.sent):
            lost = len(self.sent) - self.answered
            raise EngineError(f"The engine ended its stream with {lost} of {len(self.sent)} rows unanswered.")

    def return_unsettled(self) -> None:
        for worst in self.held.values():
            if self.budget is not None:
                self.budget.settle(worst, Decimal(0))
        self.held.clear()


def refuse_hopeless(refused: dict[int, Decimal], slices: Slices, budget: Budget | None) -> list[int]:
    """Fail the rows that no returning money can pay for; returns those that may be tried again."""
    if budget is None:
        return []
    again = []
    for number, worst in refused.items():
        if not budget.hopeless(worst):
            again.append(number)
            continue
        left = budget.limit - budget.spent
        message = f"{budget.name} {budget.limit} leaves {left:.9f}; the row may cost {worst:.9f} at list price."
        slices.add(number, Completion.failed("budget_exceeded", message))
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


def wait(theirs: dict[int, threading.Event]) -> None:
    for event in theirs.values():
        while not event.wait(0.2):  # short, so that Ctrl-C gets through
            pass


def close(stream: Iterable[object]) -> None:
    if isinstance(stream, Iterator) and hasattr(stream, "close"):
        stream.close()
