"""`summarise` counts the rows, tokens and cost of one run."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from decimal import Decimal

from complete_fn.engines.call import Call
from complete_fn.engines.prices import amount, at_prices
from complete_fn.execution.run_state import Work
from complete_fn.ledger.ledger import times, total
from complete_fn.types import Usage


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


@dataclass(frozen=True)
class Summary:
    """Counts of one or several runs.

    `usage` and `cost` are the tokens and money billed; `saved` is the money that the rows answered for free would have
    cost.

    `reordered` rows had their fields in another order than the template; `reused` rows had stored answers; `resumed`
    rows were done by an earlier attempt of the same job.
    """

    rows: int = 0
    nulls: int = 0
    distinct: int = 0
    computed: int = 0
    reused: int = 0
    resumed: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    usage: Usage = Usage()
    cost: Decimal = Decimal(0)
    saved: Decimal = Decimal(0)
    currency: str = "USD"
    basis: str = "example"
    seconds: float = 0.0
    reordered: int = 0

    def __add__(self, other: Summary) -> Summary:
        return Summary(
            self.rows + other.rows,
            self.nulls + other.nulls,
            self.distinct + other.distinct,
            self.computed + other.computed,
            self.reused + other.reused,
            self.resumed + other.resumed,
            self.failed + other.failed,
            self.usage + other.usage,
            self.cost + other.cost,
            self.saved + other.saved,
            other.currency,
            other.basis,
            self.seconds + other.seconds,
            self.reordered + other.reordered,
        )

    def line(self) -> str:
        """The summary as one line for a person."""
        u = self.usage
        share = f" ({u.cached_tokens / u.prompt_tokens:.0%} cached)" if u.prompt_tokens else ""
        parts = [
            f"{self.rows:,} rows",
            f"{self.distinct:,} distinct",
            *([f"{self.reused:,} known"] if self.reused else []),
            *([f"{self.resumed:,} resumed"] if self.resumed else []),
            *([f"{self.reordered:,} with their fields reordered"] if self.reordered else []),
            f"{u.prompt_tokens:,} tokens in{share}",
            f"{u.completion_tokens:,} out",
            f"{self.currency} {self.cost:.6f} {at_prices(self.basis)} (saved {self.saved:.6f})",
            f"{self.seconds:.1f} s",
        ]
        if self.failed:
            parts.append(f"{self.failed.total():,} failed: " + ", ".join(f"{n} {c}" for c, n in self.failed.items()))
        return " · ".join(parts)
