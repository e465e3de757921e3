"""Rate limits in tokens a minute, by tenant and by key: a token bucket for each, in this process.

A request takes what it may need before it is run, prompt and answer, and what it did not use comes back when it ends.
A request that is larger than a whole minute's tokens is let in when the bucket is full, and the next ones wait longer.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from complete_fn.errors import RateLimitError
from complete_fn.key_store import Principal


@dataclass
class Bucket:
    """`per_minute` tokens flow in each minute; no more than that stay. Not for several threads without a lock."""

    per_minute: int
    clock: Callable[[], float] = time.monotonic
    level: float = field(init=False)
    at: float = field(init=False)

    def __post_init__(self) -> None:
        self.level, self.at = float(self.per_minute), self.clock()

    def fill(self) -> None:
        now = self.clock()
        self.level = min(self.per_minute, self.level + (now - self.at) * self.per_minute / 60)
        self.at = now

    def wait(self, tokens: int) -> float:
        """Seconds until so many can be taken."""
        self.fill()
        return max(0.0, (min(tokens, self.per_minute) - self.level) * 60 / self.per_minute)

    def change(self, tokens: int) -> None:
        self.fill()
        self.level = min(self.per_minute, self.level + tokens)


@dataclass(frozen=True)
class Grant:
    """Tokens taken for one request."""

    buckets: Sequence[Bucket]
    tokens: int
    lock: threading.Lock

    def settle(self, used: int) -> None:
        """The request is over; it used so many."""
        with self.lock:
            for bucket in self.buckets:
                bucket.change(self.tokens - used)

    @property
    def headers(self) -> dict[str, str]:
        """OpenAI's headers, of the bucket with the least left; none where nothing limits the caller."""
        with self.lock:
            return limit_headers(self.buckets)


class RateLimits:
    """The buckets of all tenants and keys that have a limit."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.lock = threading.Lock()
        self.buckets: dict[tuple[str, str], Bucket] = {}

    def admit(self, caller: Principal, tokens: int) -> Grant:
        """Raises:
        RateLimitError: the tenant's or the key's bucket has not so many left.
        """
        limits = {("tenant", caller.tenant): caller.tenant_tokens, ("key", caller.key): caller.key_tokens}
        with self.lock:
            mine = {name: self.bucket(name, limit) for name, limit in limits.items() if limit is not None}
            waits = {name: bucket.wait(tokens) for name, bucket in mine.items()}
            kind, seconds = max(((n[0], w) for n, w in waits.items()), key=lambda w: w[1], default=("", 0.0))
            if seconds > 0:
                limit = limits[next(n for n in mine if n[0] == kind)]
                raise RateLimitError(
                    f"This {kind} may use {limit:,} tokens a minute, and the request may need {tokens:,}. "
                    f"Try again in {math.ceil(seconds)} s.",
                    {"Retry-After": str(math.ceil(seconds)), **limit_headers(list(mine.values()))},
                )
            for bucket in mine.values():
                bucket.change(-tokens)
        return Grant(list(mine.values()), tokens, self.lock)

    def bucket(self, name: tuple[str, str], per_minute: int) -> Bucket:
        found = self.buckets.get(name)
        if found is None or found.per_minute != per_minute:
            found = self.buckets[name] = Bucket(per_minute, self.clock)
        return found


def limit_headers(buckets: Sequence[Bucket]) -> dict[str, str]:
    if not buckets:
        return {}
    least = min(buckets, key=lambda b: b.level)
    seconds = least.wait(least.per_minute)
    return {
        "x-ratelimit-limit-tokens": str(least.per_minute),
        "x-ratelimit-remaining-tokens": str(max(0, math.floor(least.level))),
        "x-ratelimit-reset-tokens": f"{seconds:.3f}s",
    }
