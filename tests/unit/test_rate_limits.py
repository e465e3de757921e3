"""Token buckets: what flows in, what is refused, what comes back."""

from __future__ import annotations

import pytest

from complete_fn.errors import RateLimitError
from complete_fn.key_store import Principal
from complete_fn.server.rate_limits import RateLimits


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def limited(tenant: int | None = None, key: int | None = None, name: str = "k1") -> Principal:
    return Principal("acme", "u", key=name, tenant_tokens=tenant, key_tokens=key)


def test_a_minute_of_tokens_and_then_as_fast_as_they_flow() -> None:
    clock = Clock()
    rates = RateLimits(clock)
    rates.admit(limited(600), 600)
    with pytest.raises(RateLimitError) as caught:
        rates.admit(limited(600), 100)
    assert caught.value.headers["Retry-After"] == "10"
    assert caught.value.headers["x-ratelimit-remaining-tokens"] == "0"
    clock.now = 10.0
    assert rates.admit(limited(600), 100).headers["x-ratelimit-limit-tokens"] == "600"


def test_what_was_not_used_comes_back_and_what_was_used_more_is_owed() -> None:
    clock = Clock()
    rates = RateLimits(clock)
    rates.admit(limited(600), 500).settle(100)
    rates.admit(limited(600), 500).settle(1_100)
    clock.now = 60.0
    assert rates.admit(limited(600), 0).headers["x-ratelimit-remaining-tokens"] == "0"


def test_tenant_and_key_both_limit_and_other_keys_only_share_the_tenants() -> None:
    rates = RateLimits(Clock())
    rates.admit(limited(1_000, 100), 100)
    with pytest.raises(RateLimitError, match="This key may use 100"):
        rates.admit(limited(1_000, 100), 10)
    rates.admit(limited(1_000, None, "k2"), 900)
    with pytest.raises(RateLimitError, match="This tenant may use 1,000"):
        rates.admit(limited(1_000, None, "k2"), 10)


def test_a_request_larger_than_a_minute_is_let_in_when_nothing_else_was() -> None:
    clock = Clock()
    rates = RateLimits(clock)
    rates.admit(limited(60), 1_000).settle(120)
    with pytest.raises(RateLimitError):
        rates.admit(limited(60), 1)
    clock.now = 61.0
    rates.admit(limited(60), 1)


def test_without_a_limit_there_are_no_headers() -> None:
    assert RateLimits().admit(Principal(), 10**9).headers == {}
