"""The metrics of `/metrics`, for Prometheus. No label names a tenant, a user or a prompt."""

from __future__ import annotations

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from complete_fn.ledger.usage import Totals
from complete_fn.service.state import ServiceState
from complete_fn.store.records import money

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Metrics:
    """One registry of this process's own counts and of sums from the store."""

    def __init__(self, state: ServiceState) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "complete_fn_requests", "Requests by route and status.", ["route", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "complete_fn_request_seconds",
            "From a request's arrival to the end of its reply.",
            ["route"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.first_token = Histogram(
            "complete_fn_first_token_seconds",
            "From a chat's arrival to its first piece of text, or its answer where it is not streamed.",
            ["model"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.registry.register(OfStore(state))


class OfStore(Collector):
    """Metrics of ledger, queue and workers, which are read from the store at each scrape."""

    def __init__(self, state: ServiceState) -> None:
        self.state = state
        self.totals = Totals(state.store)

    def describe(self) -> list[Metric]:
        return []  # else registration would read the store, before the first scrape

    def collect(self) -> Iterator[Metric]:
        yield from self.of_ledger()
        yield from self.of_queue()
        yield from self.of_workers()

    def of_ledger(self) -> Iterator[Metric]:
        totals = self.totals.ledger()
        labels = ["model", "price_class"]
        rows = CounterMetricFamily("complete_fn_rows", "Rows of the ledger, by price class.", labels=labels)
        tokens = CounterMetricFamily("complete_fn_tokens", "Tokens of the ledger, by price class.", labels=labels)
        cost = CounterMetricFamily("complete_fn_cost", "Money billed.", labels=["model", "currency", "basis"])
        for family, sums in ((rows, totals.rows), (tokens, totals.tokens)):
            for of_class, count in sums.items():
                family.add_metric(of_class, count)
        for of_price, nano in totals.nano.items():
            cost.add_metric(of_price, float(money(nano)))
        yield from (rows, tokens, cost)

    def of_queue(self) -> Iterator[Metric]:
        labels = ["model", "status"]
        parts = GaugeMetricFamily("complete_fn_parts", "Parts of jobs that are not over.", labels=labels)
        tokens = GaugeMetricFamily("complete_fn_part_tokens", "Their estimated tokens.", labels=labels)
        for of_status, (count, size) in self.totals.parts().items():
            parts.add_metric(of_status, count)
            tokens.add_metric(of_status, size)
        swept = CounterMetricFamily("complete_fn_lease_expiries", "Parts taken back from workers that went silent.")
        swept.add_metric([], self.state.parts.swept)
        yield from (parts, tokens, swept)

    def of_workers(self) -> Iterator[Metric]:
        """Metrics of worker processes, by their heartbeats. An API process that runs the jobs itself has none."""
        beats, paces = self.state.workers.alive(), self.state.workers.paces()
        alive = GaugeMetricFamily("complete_fn_workers", "Worker processes.", labels=["draining"])
        for draining in (False, True):
            alive.add_metric([str(draining).lower()], sum(beat.draining == draining for beat in beats))
        warm = GaugeMetricFamily("complete_fn_warm_workers", "Those with the model loaded.", labels=["model"])
        rate = GaugeMetricFamily("complete_fn_tokens_per_second", "Of one worker, as measured.", labels=["model"])
        start = GaugeMetricFamily("complete_fn_cold_start_seconds", "To a first answer, as measured.", labels=["model"])
        for model, pace in paces.items():
            warm.add_metric([model], sum(beat.warm(model) for beat in beats))
            for family, value in ((rate, pace.tokens_per_second), (start, pace.cold_seconds)):
                if value is not None:
                    family.add_metric([model], value)
        yield from (alive, warm, rate, start)


class RequestCounter:
    """Counts requests by the route's pattern, never by the requested path, whose ids would make a label each."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.monotonic(), 500

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = int(message["status"])
            await send(message)

        try:
            await self.app(scope, receive, noted)
        finally:
            route = getattr(scope.get("route"), "path", "none")
            self.metrics.requests.labels(route, str(status)).inc()
            self.metrics.seconds.labels(route).observe(time.monotonic() - began)
