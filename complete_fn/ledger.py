"""Ledger lines of one slice, by price class. Pure: the store writes what this returns, in the slice's transaction."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal

from complete_fn.catalogue import Prices
from complete_fn.prices import amount, nano
from complete_fn.types import Usage


@dataclass(frozen=True, slots=True)
class LedgerLine:
    """`cost_nano` is billed, `saved_nano` is what a free line would have cost; both in 1e-9 of the currency."""

    price_class: str
    rows: int
    tokens: int
    cost_nano: int = 0
    saved_nano: int = 0


def billed(prices: Prices, rows: int, usage: Usage) -> list[LedgerLine]:
    """Lines for computed rows: uncached input (always, as it has their number), cached input, output."""
    fresh = Usage(prompt_tokens=usage.prompt_tokens - usage.cached_tokens)
    cached = Usage(prompt_tokens=usage.cached_tokens, cached_tokens=usage.cached_tokens)
    output = Usage(completion_tokens=usage.completion_tokens)
    lines = (
        LedgerLine("input", rows, fresh.prompt_tokens, nano(amount(prices, fresh))),
        LedgerLine("cached_input", rows, cached.cached_tokens, nano(amount(prices, cached))),
        LedgerLine("output", rows, output.completion_tokens, nano(amount(prices, output))),
    )
    return [line for line in lines if line.tokens or (rows and line.price_class == "input")]


def free(prices: Prices, price_class: str, rows: int, usage: Usage) -> list[LedgerLine]:
    """The line of rows that were not computed; empty if there are none."""
    if not rows:
        return []
    tokens = usage.prompt_tokens + usage.completion_tokens
    return [LedgerLine(price_class, rows, tokens, 0, nano(amount(prices, usage)))]


def total(usages: Iterable[Usage]) -> Usage:
    prompt = cached = completion = 0
    for u in usages:
        prompt += u.prompt_tokens
        cached += u.cached_tokens
        completion += u.completion_tokens
    return Usage(prompt, cached, completion)


def times(usage: Usage, copies: int) -> Usage:
    return Usage(usage.prompt_tokens * copies, usage.cached_tokens * copies, usage.completion_tokens * copies)


def money(nano_units: int) -> Decimal:
    return Decimal(nano_units).scaleb(-9)
