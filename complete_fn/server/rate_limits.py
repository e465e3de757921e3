"""Rate limits bound tokens per minute, by tenant and by API key. The store has the buckets, for all API processes.

Before a request runs, it takes the tokens that prompt and answer may need. Tokens that it did not use come back when it
ends. A request for more tokens than a whole minute's is admitted if none are in use, and the next ones wait longer.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import sqlalchemy as sa

from complete_fn.errors import RateLimitError, StoreError
from complete_fn.jobs.api_keys import Principal
from complete_fn.logs import logger
from complete_fn.store.job_tables import token_buckets
from complete_fn.store.store import Store
from complete_fn.store.transactions import upsert

LOG = logger("server")
C = token_buckets.c


class BucketName(NamedTuple):
    """The owner of a bucket: `kind` is "tenant" or "key", `name` the tenant or the API key's id."""

    kind: str
    name: str


@dataclass(frozen=True, slots=True)
class Bucket:
    """`used` of a minute's `limit` of tokens, at time `at` (seconds of the epoch). They drain at the limit's pace."""

    limit: int
    used: float
    at: float

    def drained(self, now: float) -> Bucket:
        later = max(self.at, now)  # `at` may be later: another machine's clock wrote it
        return Bucket(self.limit, max(0.0, self.used - (later - self.at) * self.limit / 60), later)

    def wait(self, tokens: int) -> float:
        """Seconds until so many tokens can be taken."""
        return max(0.0, (self.used + min(tokens, self.limit) - self.limit) * 60 / self.limit)

    @property
    def left(self) -> int:
        return max(0, math.floor(self.limit - self.used))


@dataclass
class Grant:
    """Tokens taken for one request. `headers` are OpenAI's rate-limit headers; empty if the caller has no limit."""

    tokens: int
    give_back: Callable[[float], dict[str, str]] | None = None
    headers: dict[str, str] = field(default_factory=dict)

    def settle(self, used: int) -> None:
        """End the grant of a request that used so many tokens: the others go back to the buckets."""
        if self.give_back is not None and used != self.tokens:
            try:
                self.headers = self.give_back(self.tokens - used)
            except StoreError as error:  # logged, not raised: the reply need not fail, as the bucket drains anyway
                LOG.warning("tokens of a rate limit were not given back: %s", type(error).__name__)

    async def settled(self, used: int) -> None:
        """`settle` off the event loop. It completes even if the task is cancelled."""
        if self.give_back is not None:
            await asyncio.get_running_loop().run_in_executor(None, self.settle, used)


class RateLimits:
    """The buckets of all tenants and keys that have a limit. Others never touch the store.

    Args:
        clock: seconds of the epoch.
    """

    def __init__(self, store: Store, clock: Callable[[], float] = time.time) -> None:
        self.store, self.clock = store, clock

    def admit(self, caller: Principal, tokens: int) -> Grant:
        """Raises:
        RateLimitError: The tenant's or the API key's bucket has too few tokens left.
        """
        limits = limits_of(caller)
        if not limits:
            return Grant(tokens)
        with self.store.write() as connection:
            buckets = self.buckets(connection, limits)
            name, bucket = max(buckets.items(), key=lambda b: b[1].wait(tokens))
            if (seconds := bucket.wait(tokens)) > 0:
                raise RateLimitError(
                    f"This {name.kind} may use {bucket.limit:,} tokens a minute, and the request may need {tokens:,}. "
                    f"Try again in {math.ceil(seconds)} s.",
                    {"Retry-After": str(math.ceil(seconds)), **limit_headers(buckets)},
                )
            after = self.add(connection, buckets, tokens)
        return Grant(tokens, lambda back: self.change(limits, -back), limit_headers(after))

    async def admitted(self, caller: Principal, tokens: int) -> Grant:
        """`admit` off the event loop."""
        if not limits_of(caller):
            return Grant(tokens)
        return await asyncio.get_running_loop().run_in_executor(None, self.admit, caller, tokens)

    def change(self, limits: Mapping[BucketName, int], tokens: float) -> dict[str, str]:
        """Add tokens to the buckets; returns the headers afterwards."""
        with self.store.write() as connection:
            return limit_headers(self.add(connection, self.buckets(connection, limits), tokens))

    def buckets(self, connection: sa.Connection, limits: Mapping[BucketName, int]) -> dict[BucketName, Bucket]:
        """The buckets, drained to the present time, with their rows locked."""
        now = self.clock()
        chosen = sa.select(token_buckets).where(sa.tuple_(C.kind, C.name).in_(list(limits))).order_by(C.kind)
        rows = connection.execute(chosen.with_for_update()).all()
        if len(rows) < len(limits):
            fresh = [{"kind": n.kind, "name": n.name, "used": 0.0, "at": now} for n in limits]
            upsert(connection, token_buckets, ("kind", "name"), fresh, only=())
            rows = connection.execute(chosen.with_for_update()).all()
        found = {BucketName(row.kind, row.name): row for row in rows}
        return {name: Bucket(limit, found[name].used, found[name].at).drained(now) for name, limit in limits.items()}

    def add(
        self, connection: sa.Connection, buckets: Mapping[BucketName, Bucket], tokens: float
    ) -> dict[BucketName, Bucket]:
        after = {name: replace(bucket, used=max(0.0, bucket.used + tokens)) for name, bucket in buckets.items()}
        rows = [{"kind": n.kind, "name": n.name, "used": b.used, "at": b.at} for n, b in after.items()]
        upsert(connection, token_buckets, ("kind", "name"), rows)
        return after


def limits_of(caller: Principal) -> dict[BucketName, int]:
    found = {
        BucketName("key", caller.key): caller.key_tokens,
        BucketName("tenant", caller.tenant): caller.tenant_tokens,
    }
    return {name: limit for name, limit in found.items() if limit is not None}


def limit_headers(buckets: Mapping[BucketName, Bucket]) -> dict[str, str]:
    least = min(buckets.values(), key=lambda b: b.left)
    return {
        "x-ratelimit-limit-tokens": str(least.limit),
        "x-ratelimit-remaining-tokens": str(least.left),
        "x-ratelimit-reset-tokens": f"{least.wait(least.limit):.3f}s",
    }
