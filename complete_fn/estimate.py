"""What a run would take, said before it is paid for: rows, tokens by the model's own tokenizer, price. No engine."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from complete_fn.budget import Budget
from complete_fn.catalogue import Model
from complete_fn.keys import Call
from complete_fn.options import CacheMode
from complete_fn.plan import make_plan
from complete_fn.plan.batch import to_texts
from complete_fn.plan.parts import BYTES_PER_TOKEN
from complete_fn.prices import amount, at_prices
from complete_fn.prompts import MESSAGES_MARK
from complete_fn.reports import mean_output
from complete_fn.store import Store
from complete_fn.token_counts import count_with, template_tokens, tokenizer_file
from complete_fn.types import Asker, Usage
from complete_fn.work import known_answers

SAMPLE = 1_000  # prompts counted of a larger table
Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class TokenCount:
    """Prompt tokens of `prompts` prompts, `counted` of them counted.

    `margin` is half the 95 % interval; 0 where all were counted, None where no tokenizer is at hand.
    `template` is what the chat template adds to a prompt; None where it could not be rendered: `total` is without it.
    """

    total: int
    margin: int | None
    counted: int
    prompts: int
    template: int | None


@dataclass(frozen=True, slots=True)
class Estimate:
    """A run before it is made. `known` rows have stored answers; `output` is the most, `expected` the likely output."""

    call: Call
    rows: int
    nulls: int
    distinct: int
    known: int
    tokens: TokenCount
    output: int
    expected: int | None
    cap: Decimal | None


def estimate(
    call: Call, prompts: Any, store: Store, who: Asker, cache: CacheMode, budget: Budget | None = None
) -> Estimate:
    """Plan the run and count what is left of it. Reads the store, writes nothing, starts no engine."""
    plan = make_plan(prompts, mergeable=call.sampling.greedy)
    work = known_answers(call, plan, store, who, cache)
    missing = plan.first[work.missing()]
    mean = mean_output(store, call.model.name)
    limit = call.sampling.max_tokens or call.model.default_max_tokens
    return Estimate(
        call=call,
        rows=len(plan.prompts),
        nulls=plan.prompts.null_count,
        distinct=len(plan.first),
        known=int(plan.copies()[sorted(work.reused)].sum()) if work.reused else 0,
        tokens=count_tokens(call.model, plan.prompts, missing),
        output=len(missing) * limit,
        expected=None if mean is None else int(len(missing) * min(mean, limit)),
        cap=None if budget is None else budget.limit,
    )


def count_tokens(model: Model, prompts: Any, rows: npt.NDArray[np.int64], sample: int = SAMPLE) -> TokenCount:
    """Tokens of the prompts in `rows`: all counted, or `sample` of them drawn and the rest by their length in bytes."""
    lengths = pc.binary_length(prompts.take(pa.array(rows))).to_numpy().astype(np.float64)
    file = tokenizer_file(model)
    if file is None:
        return TokenCount(math.ceil(lengths.sum() / BYTES_PER_TOKEN), None, 0, len(rows), None)
    template = template_tokens(model)
    added = (template or 0) * len(rows)
    if len(rows) <= sample:
        counts = count_with(file, plain(prompts, rows))
        return TokenCount(sum(counts) + added, 0, len(rows), len(rows), template)
    drawn = np.random.default_rng(0).choice(len(rows), sample, replace=False)
    counted = np.array(count_with(file, plain(prompts, rows[np.sort(drawn)])), np.float64)
    total, margin = ratio_estimate(counted, lengths[np.sort(drawn)], float(lengths.sum()), len(rows))
    return TokenCount(round(total) + added, math.ceil(margin), sample, len(rows), template)


def plain(prompts: Any, rows: npt.NDArray[np.int64]) -> list[str]:
    """Prompts as texts to count; a conversation is counted by the contents of its messages."""
    texts = to_texts(prompts.take(pa.array(rows)))
    return [contents(t) if t.startswith(MESSAGES_MARK) else t for t in texts]


def contents(packed: str) -> str:
    return "\n".join(content for _, content in json.loads(packed.removeprefix(MESSAGES_MARK)))


def ratio_estimate(counted: Numbers, lengths: Numbers, length: float, population: int) -> tuple[float, float]:
    """(total, half its 95 % interval) of a count that goes with a length known for all.

    The ratio estimator of survey sampling: R = sum(y) / sum(x), total = R * X, and
    var = N^2 (1 - n/N) / n * sum((y - R x)^2) / (n - 1)   (Cochran, Sampling Techniques, 3rd edition, 6.4).
    """
    n = len(counted)
    ratio = counted.sum() / max(lengths.sum(), 1.0)
    spread = ((counted - ratio * lengths) ** 2).sum() / (n - 1)
    variance = population**2 * (1 - n / population) / n * spread
    return ratio * length, 1.96 * math.sqrt(variance)


def report(e: Estimate) -> str:
    """The estimate as lines for a person."""
    prices = e.call.model.prices
    paid_input = amount(prices, Usage(prompt_tokens=e.tokens.total))
    most = paid_input + amount(prices, Usage(completion_tokens=e.output))
    todo = e.tokens.prompts
    limit = e.call.sampling.max_tokens or e.call.model.default_max_tokens
    lines = [
        ("rows", f"{e.rows:,}" + (f" ({e.nulls:,} NULL: no answer, no cost)" if e.nulls else "")),
        ("distinct", f"{e.distinct:,}"),
        ("known answers", f"{e.known:,} rows"),
        ("to compute", f"{todo:,} prompts with {e.call.model.name}"),
        ("input tokens", input_line(e.tokens)),
        ("output tokens", f"at most {e.output:,} ({limit:,} each)" + expected_line(e)),
        ("price", f"at most {prices.currency} {most:.6f} (input {paid_input:.6f}) {at_prices(prices.basis)}"),
    ]
    if e.expected is not None:
        likely = paid_input + amount(prices, Usage(completion_tokens=e.expected))
        lines.append(("likely", f"{prices.currency} {likely:.6f}, less what the prefix cache spares"))
    if e.cap is not None:
        fits = "covers" if most <= e.cap else "may not cover"
        lines.append(("max cost", f"{prices.currency} {e.cap} {fits} it"))
    return "\n".join(f"{name:15}{text}" for name, text in lines)


def expected_line(e: Estimate) -> str:
    return "" if e.expected is None else f", about {e.expected:,} by the model's past rows"


def input_line(t: TokenCount) -> str:
    if t.margin is None:
        return f"about {t.total:,}, from {BYTES_PER_TOKEN} bytes a token: this model's tokenizer is not on this machine"
    how = "all counted" if not t.margin and t.counted == t.prompts else ""
    if not how:
        how = f"±{t.margin:,} at 95 %, {t.counted:,} of {t.prompts:,} prompts counted"
    template = "without the chat template" if t.template is None else f"{t.template} a prompt for the chat template"
    return f"{t.total:,} ({how}; {template})"
