"""Pure functions make one slice's ledger lines, by price class. The store writes them in the slice's transaction."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from complete_fn.engines.catalogue import Prices
from complete_fn.engines.prices import amount, nano
from complete_fn.store.records import LedgerLine
from complete_fn.types import Usage


def billed(
    prices: Prices, rows: int, usage: Usage, skipped: float = 0.0, engine: str | None = None
) -> list[LedgerLine]:
    """The lines of computed rows: `input` (uncached; always there, because it has the rows), `cached_input`, `output`.

    Two more lines are free and tell savings:

    - `prefix_cache`: what the cached tokens would have cost uncached, less what was paid for them; and the device time
      that they would have taken, at the slice's measured rate (device-seconds per computed prompt token).
    - `swiftkv`, for a model whose prompt tokens skip the share `skipped` of their FLOPs: the device time that the
      skipped layers would have taken, t * skipped / (1 - skipped) with t the prompts' measured time. It saves no list
      price, because prices are per token.
    """
    fresh = Usage(prompt_tokens=usage.prompt_tokens - usage.cached_tokens)
    cached = Usage(prompt_tokens=usage.cached_tokens, cached_tokens=usage.cached_tokens)
    output = Usage(completion_tokens=usage.completion_tokens)
    uncached = Usage(prompt_tokens=usage.cached_tokens)
    spared = nano(amount(prices, uncached)) - nano(amount(prices, cached))
    device = round(usage.device_seconds * 1e6)
    prompts = usage.prompt_seconds * 1e6
    rate = prompts / max(1, fresh.prompt_tokens)
    unskipped = prompts * skipped / (1 - skipped)
    lines = [
        LedgerLine("input", rows, fresh.prompt_tokens, nano(amount(prices, fresh)), 0, device),
        LedgerLine("cached_input", rows, cached.cached_tokens, nano(amount(prices, cached))),
        LedgerLine("output", rows, output.completion_tokens, nano(amount(prices, output))),
        LedgerLine("prefix_cache", 0, cached.cached_tokens, 0, spared, 0, round(cached.cached_tokens * rate)),
    ]
    if skipped and device:
        lines.append(LedgerLine("swiftkv", 0, fresh.prompt_tokens, saved_us=round(unskipped)))
    return [replace(x, engine=engine) for x in lines if x.tokens or (rows and x.price_class == "input")]


def free(prices: Prices, price_class: str, rows: int, usage: Usage) -> list[LedgerLine]:
    """The line of rows that were not computed; an empty list without such rows.

    Args:
        usage: What it would have taken to compute these rows. The line shows its tokens, and its price and
            device-seconds as saved.
    """
    if not rows:
        return []
    tokens = usage.prompt_tokens + usage.completion_tokens
    saved_us = round(usage.device_seconds * 1e6)
    return [LedgerLine(price_class, rows, tokens, 0, nano(amount(prices, usage)), 0, saved_us)]


def total(usages: Iterable[Usage]) -> Usage:
    prompt = cached = completion = 0
    device = prompts = 0.0
    for u in usages:
        prompt += u.prompt_tokens
        cached += u.cached_tokens
        completion += u.completion_tokens
        device += u.device_seconds
        prompts += u.prompt_seconds
    return Usage(prompt, cached, completion, device, prompts)


def times(usage: Usage, copies: int) -> Usage:
    u = usage
    tokens = u.prompt_tokens * copies, u.cached_tokens * copies, u.completion_tokens * copies
    return Usage(*tokens, u.device_seconds * copies, u.prompt_seconds * copies)
