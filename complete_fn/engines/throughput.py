"""A `Pace` measures how fast a model answers in this process, and how long its engine takes to start."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from complete_fn.engines.base import Engine
from complete_fn.types import Completion, CompletionRequest

HALVE_SECONDS = 60.0  # after so much work the sums are halved, so that older work counts less and less


@dataclass(frozen=True, slots=True)
class Throughput:
    """Prompt and answer tokens of all rows per second of work, and seconds from a cold model to its first answer."""

    tokens_per_second: float | None = None
    cold_seconds: float | None = None


class Pace:
    """One model's throughput over all threads. The time of a cold start is kept apart from the time of work."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.warm = False
        self.running = 0
        self.since = time.monotonic()
        self.cold_seconds: float | None = None
        self.tokens = self.seconds = 0.0

    def begin(self) -> None:
        with self.lock:
            if not self.running:
                self.since = time.monotonic()
            self.running += 1

    def answered(self, tokens: int) -> None:
        now = time.monotonic()
        with self.lock:
            if self.warm:
                self.seconds += now - self.since
            else:
                self.warm, self.cold_seconds = True, now - self.since
            self.since, self.tokens = now, self.tokens + tokens
            if self.seconds > HALVE_SECONDS:
                self.seconds, self.tokens = self.seconds / 2, self.tokens / 2

    def end(self) -> None:
        with self.lock:
            self.running -= 1

    def cool(self) -> None:
        """Note that the engine is closed, so that the next answer measures a cold start."""
        with self.lock:
            self.warm = False

    @property
    def measured(self) -> Throughput:
        with self.lock:
            rate = self.tokens / self.seconds if self.seconds > 1.0 else None
            return Throughput(rate, self.cold_seconds)


@dataclass
class Watch:
    """Counts a run's answered rows. `fed` is called when the engine has drawn the last request."""

    fed: Callable[[], None] = lambda: None
    answered: int = 0


class PacedEngine:
    """Wraps an engine: `pace` measures its answers, `watch` counts them."""

    def __init__(self, engine: Engine, pace: Pace, watch: Watch) -> None:
        self.engine, self.pace, self.watch = engine, pace, watch

    def stream(self, requests: Iterable[CompletionRequest], tenant: str) -> Iterator[tuple[int, Completion]]:
        stream = self.engine.stream(self.feeding(requests), tenant)
        try:
            for position, completion in stream:
                self.watch.answered += 1
                self.pace.answered(completion.usage.prompt_tokens + completion.usage.completion_tokens)
                yield position, completion
        finally:
            if hasattr(stream, "close"):
                stream.close()

    def feeding(self, requests: Iterable[CompletionRequest]) -> Iterator[CompletionRequest]:
        yield from requests
        self.watch.fed()

    def count_tokens(self, texts: list[str]) -> list[int]:
        return self.engine.count_tokens(texts)

    def close(self) -> None:
        self.engine.close()
