"""An estimate tells a run's tokens, cached share, price and device-seconds before it is paid for. Starts no engine."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np
import numpy.typing as npt

from complete_fn.engines.call import Call
from complete_fn.engines.catalogue import Model
from complete_fn.engines.prices import amount
from complete_fn.engines.tokenizer import (
    count_with,
    ids_with,
    template_around,
    template_tokens,
    token_sizes,
    tokenizer_file,
)
from complete_fn.execution.run_state import Work, known_answers
from complete_fn.history.run_history import Lengths, Rates, kind_of, lengths, past, rates
from complete_fn.planning import make_plan
from complete_fn.planning.prefix_tree import common_tokens, hits
from complete_fn.prompts.options import CacheMode
from complete_fn.prompts.templates import MESSAGES_MARK
from complete_fn.spending.budget import Budget
from complete_fn.store.store import Store
from complete_fn.tokens import BYTES_PER_TOKEN
from complete_fn.types import Asker, Usage

SAMPLE = 1_000  # prompts whose tokens are counted in a larger table
Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class TokenCount:
    """The prompt tokens of `prompts` prompts.

    Attributes:
        margin: half the 95 % interval; 0 if all prompts were counted, None without a tokenizer.
        counted: the number of prompts whose tokens were counted.
        template: tokens that the chat template adds to a prompt; None if it could not be rendered, and then `total`
            is without them.
    """

    total: int
    margin: int | None
    counted: int
    prompts: int
    template: int | None


@dataclass(frozen=True, slots=True)
class CachedShare:
    """Prompt tokens that the engine's prefix cache will return, in blocks of `block`, if it is empty at the start."""

    total: int
    margin: int
    block: int


@dataclass(frozen=True, slots=True)
class Estimate:
    """The estimate of a run.

    Attributes:
        known: rows that have stored answers.
        cached: None if not known, for an endpoint's cache or without a tokenizer.
        output: the most output tokens of all answers.
        limit: the most output tokens of one answer.
        answers: the lengths of past answers; None without past answers.
        rates: the rates of past runs on this machine; None without past runs.
        cap: the run's `max_cost`.
        token_cap: the run's `max_total_tokens`.
    """

    call: Call
    rows: int
    nulls: int
    distinct: int
    known: int
    reordered: int
    tokens: TokenCount
    cached: CachedShare | None
    output: int
    limit: int
    answers: Lengths | None
    rates: Rates | None
    cap: Decimal | None = None
    token_cap: Decimal | None = None

    @property
    def likely(self) -> Usage:
        """The tokens that will likely be billed."""
        todo = self.tokens.prompts
        output = self.output if self.answers is None else min(self.output, round(todo * self.answers.mean))
        return Usage(self.tokens.total, self.cached.total if self.cached else 0, output)

    @property
    def price(self) -> Decimal:
        """The likely list price."""
        return amount(self.call.model.prices, self.likely)

    @property
    def most(self) -> Decimal:
        """The list price if nothing is cached and every answer has its most tokens."""
        return amount(self.call.model.prices, Usage(self.tokens.total, 0, self.output))

    @property
    def seconds(self) -> float | None:
        """Device-seconds by the rates of past runs, without the engine's start; None without past runs."""
        return None if self.rates is None else self.rates.of(self.likely, self.tokens.prompts)

    @property
    def clock_seconds(self) -> float | None:
        """The same in seconds by the clock, if no other run uses the engine."""
        return None if self.rates is None or self.seconds is None else self.seconds * self.rates.clock


def estimate(
    call: Call,
    prompts: Any,
    store: Store,
    who: Asker,
    cache: CacheMode,
    budget: Budget | None = None,
    tokens: Budget | None = None,
) -> Estimate:
    """Plan the run and count the prompts without a stored answer. Reads the store, writes nothing, starts no engine.

    Args:
        prompts: as `runner.run` takes them.
        budget, tokens: the caps on money and tokens that the run would have.
    """
    plan = make_plan(prompts, mergeable=call.sampling.greedy, sizes=token_sizes(call.model))
    work = known_answers(call, plan, store, who, cache)
    missing = np.array(work.missing(), np.int64)
    limit = call.sampling.max_tokens or call.model.default_max_tokens
    kind = kind_of(call, plan)
    found = past(store, call.model.name)
    copies = plan.copies()
    return Estimate(
        call=call,
        rows=len(plan.prompts),
        nulls=plan.prompts.null_count,
        distinct=len(plan.first),
        known=int(copies[sorted(work.reused)].sum()) if work.reused else 0,
        reordered=int(copies[plan.moved()].sum()),
        tokens=count_tokens(call.model, work, missing),
        cached=count_cached(call.model, work, missing),
        output=len(missing) * limit,
        limit=limit,
        answers=lengths(past(store, call.model.name, who.tenant), kind),
        rates=rates(found, kind) if found else None,
        cap=None if budget is None else budget.limit,
        token_cap=None if tokens is None else tokens.limit,
    )


def said(work: Work, numbers: npt.NDArray[np.int64]) -> list[str]:
    """The prompts as texts whose tokens can be counted. A conversation counts by the contents of its messages."""
    found = []
    for number, text in work.texts(numbers.tolist()):
        prompt = work.prompt(number, text)
        found.append(prompt if isinstance(prompt, str) else contents(text))
    return found


def contents(packed: str) -> str:
    return "\n".join(content for _, content in json.loads(packed.removeprefix(MESSAGES_MARK)))


def count_tokens(model: Model, work: Work, missing: npt.NDArray[np.int64], sample: int = SAMPLE) -> TokenCount:
    """Tokens of the prompts `missing`: counted for all, or for a random `sample`, and by bytes for the others."""
    sizes = work.plan.bytes()[missing].astype(np.float64)
    file = tokenizer_file(model)
    if file is None:
        return TokenCount(math.ceil(sizes.sum() / BYTES_PER_TOKEN), None, 0, len(missing), None)
    template = template_tokens(model)
    added = (template or 0) * len(missing)
    drawn = sampled(len(missing), sample)
    counted = np.array(count_with(file, said(work, missing[drawn])), np.float64)
    if len(drawn) == len(missing):
        return TokenCount(int(counted.sum()) + added, 0, len(missing), len(missing), template)
    total, margin = ratio_estimate(counted, sizes[drawn], float(sizes.sum()), len(missing))
    return TokenCount(round(total) + added, math.ceil(margin), sample, len(missing), template)


def count_cached(model: Model, work: Work, missing: npt.NDArray[np.int64], sample: int = SAMPLE) -> CachedShare | None:
    """Tokens that each prompt shares with the one before it in execution order, in blocks of the engine's cache."""
    file, around = tokenizer_file(model), template_around(model)
    if file is None or around is None or model.engine != "embedded":
        return None
    block = work.plan.sizes.block
    if len(missing) < 2:
        return CachedShare(0, 0, block)
    before, behind = around
    drawn = sampled(len(missing) - 1, sample) + 1
    both = np.unique(np.concatenate([drawn - 1, drawn]))
    ids = ids_with(file, [before + text + behind for text in said(work, missing[both])])
    of = dict(zip(both.tolist(), ids, strict=True))
    found = [hits(common_tokens(of[n - 1], of[n]), len(of[n]), block) for n in drawn.tolist()]
    cached = np.array(found, np.float64)
    if len(drawn) == len(missing) - 1:
        return CachedShare(int(cached.sum()), 0, block)
    total, margin = ratio_estimate(cached, np.ones(len(cached)), len(missing) - 1.0, len(missing) - 1)
    return CachedShare(round(total), math.ceil(margin), block)


def sampled(population: int, sample: int) -> npt.NDArray[np.int64]:
    """Sorted numbers below `population`: all, or `sample` drawn without replacement, the same ones at every call."""
    if population <= sample:
        return np.arange(population)
    drawn: npt.NDArray[np.int64] = np.sort(np.random.default_rng(0).choice(population, sample, replace=False))
    return drawn


def ratio_estimate(counted: Numbers, lengths: Numbers, length: float, population: int) -> tuple[float, float]:
    """(total, half its 95 % interval) of a count that is proportional to a length, which is known for all.

    The ratio estimator of survey sampling: R = sum(y) / sum(x), total = R * X, and
    var = N^2 (1 - n/N) / n * sum((y - R x)^2) / (n - 1)   (Cochran, Sampling Techniques, 3rd edition, 6.4).
    """
    n = len(counted)
    ratio = counted.sum() / max(lengths.sum(), 1.0)
    spread = ((counted - ratio * lengths) ** 2).sum() / (n - 1)
    variance = population**2 * (1 - n / population) / n * spread
    return ratio * length, 1.96 * math.sqrt(variance)
