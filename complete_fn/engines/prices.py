"""`amount` computes what tokens cost. Sums are exact: tokens times a decimal price, rounded to 1e-9 once per sum."""

from __future__ import annotations

from decimal import ROUND_HALF_EVEN, Decimal

from complete_fn.engines.catalogue import Prices
from complete_fn.types import Usage

NANO = Decimal("1e-9")


def amount(prices: Prices, usage: Usage) -> Decimal:
    """The cost of uncached input, cached input and output tokens, each at its price per million."""
    fresh = usage.prompt_tokens - usage.cached_tokens
    total = fresh * prices.input + usage.cached_tokens * prices.cached_input + usage.completion_tokens * prices.output
    return (total / 1_000_000).quantize(NANO, ROUND_HALF_EVEN)


def at_prices(basis: str) -> str:
    """The basis of a sum in words: "at example prices", "at your prices", "at metered prices"."""
    return f"at {'your' if basis == 'yours' else basis} prices"


def nano(money: Decimal) -> int:
    return int(money.scaleb(9).to_integral_value(ROUND_HALF_EVEN))
