"""Token buckets in the store: what drains, what is refused, what comes back, and that API processes share them."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from complete_fn.errors import RateLimitError
from complete_fn.jobs.api_keys import Principal
from complete_fn.server.rate_limits import RateLimits
from complete_fn.store.store import Store


class Clock:
    def __init__(self, now: float = 1_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def store(store_url: str) -> Iterator[Store]:
    store = Store(store_url)
    yield store
    store.close()


def limited(tenant: int | None = None, key: int | None = None, name: str = "k1") -> Principal:
    return Principal("acme", "u", key=name, tenant_tokens=tenant, key_tokens=key)


def test_a_minute_of_tokens_and_then_as_fast_as_they_flow(store: Store) -> None:
    clock = Clock()
    rates = RateLimits(store, clock)
    rates.admit(limited(600), 600)
    with pytest.raises(RateLimitError) as caught:
        rates.admit(limited(600), 100)
    assert caught.value.headers["Retry-After"] == "10"
    assert caught.value.headers["x-ratelimit-remaining-tokens"] == "0"
    clock.now += 10.0
    assert rates.admit(limited(600), 100).headers["x-ratelimit-limit-tokens"] == "600"


def test_what_was_not_used_comes_back_and_what_was_used_more_is_owed(store: Store) -> None:
    clock = Clock()
    rates = RateLimits(store, clock)
    rates.admit(limited(600), 500).settle(100)
    rates.admit(limited(600), 500).settle(1_100)
    clock.now += 60.0
    assert rates.admit(limited(600), 0).headers["x-ratelimit-remaining-tokens"] == "0"


def test_tenant_and_key_both_limit_and_other_keys_only_share_the_tenants(store: Store) -> None:
    rates = RateLimits(store, Clock())
    rates.admit(limited(1_000, 100), 100)
    with pytest.raises(RateLimitError, match="This key may use 100"):
        rates.admit(limited(1_000, 100), 10)
    rates.admit(limited(1_000, None, "k2"), 900)
    with pytest.raises(RateLimitError, match="This tenant may use 1,000"):
        rates.admit(limited(1_000, None, "k2"), 10)


def test_a_request_larger_than_a_minute_is_let_in_when_nothing_else_was(store: Store) -> None:
    clock = Clock()
    rates = RateLimits(store, clock)
    rates.admit(limited(60), 1_000).settle(120)
    with pytest.raises(RateLimitError):
        rates.admit(limited(60), 1)
    clock.now += 61.0
    rates.admit(limited(60), 1)


def test_without_a_limit_there_are_no_headers(store: Store) -> None:
    assert RateLimits(store).admit(Principal(), 10**9).headers == {}


def test_api_processes_share_the_buckets_whatever_their_clocks_say(store: Store, store_url: str) -> None:
    other_store = Store(store_url)
    clock, behind = Clock(1_000.0), Clock(940.0)
    here, there = RateLimits(store, clock), RateLimits(other_store, behind)
    here.admit(limited(600), 400)
    granted = there.admit(limited(600), 200)
    assert granted.headers["x-ratelimit-remaining-tokens"] == "0"
    behind.now += 59.0
    with pytest.raises(RateLimitError):
        here.admit(limited(600), 1)  # nor did the slower clock's turn let a minute drain twice
    granted.settle(0)
    assert here.admit(limited(600), 150).headers["x-ratelimit-remaining-tokens"] == "50"
    other_store.close()


def test_crowds_take_no_more_than_there_is(store: Store, store_url: str) -> None:
    other_store = Store(store_url)
    clock = Clock()
    shared = [RateLimits(store, clock), RateLimits(other_store, clock)]

    def admitted(number: int) -> int:
        try:
            shared[number % 2].admit(limited(100, 1_000), 7)
        except RateLimitError:
            return 0
        return 1

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(admitted, range(40))) == 100 // 7
    other_store.close()


def test_a_changed_limit_keeps_what_was_used(store: Store) -> None:
    rates = RateLimits(store, Clock())
    rates.admit(limited(100), 100)
    assert rates.admit(limited(300), 150).headers["x-ratelimit-remaining-tokens"] == "50"
    with pytest.raises(RateLimitError, match="may use 200 tokens"):
        rates.admit(limited(200), 1)
