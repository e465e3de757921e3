"""The summary of one run, from its work."""

from __future__ import annotations

from collections import Counter

from complete_fn.engines.call import Call
from complete_fn.engines.prices import amount
from complete_fn.execution.answers import Summary
from complete_fn.execution.run_state import Work
from complete_fn.ledger.ledger import times, total


def summarise(call: Call, work: Work, seconds: float) -> Summary:
    copies = work.plan.copies().tolist()
    prices = call.model.prices
    completions = list(enumerate(work.completions))
    reused = work.reused - work.resumed
    computed = total(c.usage for n, c in completions if n not in work.reused)
    free = total(times(c.usage, copies[n] - (n not in reused)) for n, c in completions if n not in work.resumed)
    failed: Counter[str] = Counter()
    for n, c in completions:
        if c.error is not None:
            failed[c.error.code] += copies[n]
    return Summary(
        rows=len(work.plan.prompts),
        nulls=work.plan.prompts.null_count,
        distinct=len(completions),
        computed=len(completions) - len(work.reused),
        reused=sum(copies[n] for n in reused),
        resumed=sum(copies[n] for n in work.resumed),
        failed=failed,
        usage=computed,
        cost=amount(prices, computed),
        saved=amount(prices, free),
        currency=prices.currency,
        basis=prices.basis,
        seconds=seconds,
        reordered=int(work.plan.copies()[work.plan.moved()].sum()),
    )
