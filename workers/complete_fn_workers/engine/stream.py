"""`EngineStream` passes one stream's rows through the child, which may die or hang meanwhile.

A child that dies is restarted and its rows are asked again. If it dies a second time, one of the rows in flight may be
the cause. They are asked again while no other stream's rows run, then in halves. A row at which the engine dies twice
while the row runs alone gets the row error `engine_failed`; the others are answered.

A child that hangs is killed, so it counts as dead.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

from complete_fn.engines.structured_output import checked
from complete_fn.errors import EngineError
from complete_fn.types import Completion, CompletionRequest, SamplingParams, Usage
from complete_fn_workers.engine.link import EngineGone, Link, RowSender, completion_of, is_sendable, usage_of

if TYPE_CHECKING:
    from complete_fn_workers.engine.client import EmbeddedEngine

CHUNK_ROWS = 32
LOOK_SECONDS = 0.2  # how often a waiting stream checks whether its caller has abandoned it
METER_SECONDS = 5.0  # wait for the child's meter: it answers between two steps
MOST_DEATHS = 60  # of the child in one stream
MOST_UNBORN = 3
MOST_POISON = 3  # rows of one stream that may kill the engine; if more do, the engine is at fault
# The child tells after each second, or after a longer step, that it works. It hangs if it is silent for so many times
# the longest silence before, but at least for the seconds of the second bound; a first step may take longer.
HANG_TIMES, HANG_SECONDS, FIRST_STEP_SECONDS = 20, 120.0, 900.0
UNSENDABLE = "The prompt has no messages, or a lone surrogate (half of a character) that cannot be encoded."
POISON = "The engine died or hung at this row, twice while it ran alone."
PROBE = -1  # the number of a row of our own, which shows whether the engine dies at any row

Rows = dict[int, CompletionRequest]


class EngineStream:
    """One stream of an engine. `unfinished` has the rows that were drawn and have no answer."""

    def __init__(self, engine: EmbeddedEngine, requests: Iterable[CompletionRequest], tenant: str) -> None:
        self.engine, self.tenant = engine, tenant
        self.feed = enumerate(requests)
        self.is_abandoned = partial(is_abandoned, requests)
        self.unfinished: Rows = {}
        self.deaths = self.poisoned = 0
        self.suspects: set[int] = set()  # rows at which the engine has died while they ran alone
        self.watch = HangWatch()

    def rows(self) -> Iterator[tuple[int, Completion]]:
        again = False
        while True:
            try:
                yield from self.exchange(self.unfinished, self.feed)
                return
            except EngineGone:
                self.count_death()
            if again:
                yield from self.without_poison()
            again = not again

    def count_death(self) -> None:
        """Raises:
        EngineError: Answers were being read, or the child has died too often.
        """
        self.deaths += 1
        if any(request.tell is not None for request in self.unfinished.values()):
            raise EngineError(self.engine.failure_message("died while its answer was being read"))
        if self.deaths >= MOST_DEATHS:
            raise EngineError(self.engine.failure_message(f"died {self.deaths} times"))

    def without_poison(self) -> Iterator[tuple[int, Completion]]:
        """Answer the rows in flight in halves, and so on, until each row that kills the engine is known.

        Raises:
            EngineError: The engine dies at any row, or at more than `MOST_POISON` rows.
        """
        self.refuse_broken_engine()
        groups = [dict(self.unfinished)]
        while groups and not self.is_abandoned():
            group = groups.pop()
            try:
                for number, completion in self.exchange(group, alone=True):
                    self.unfinished.pop(number)
                    yield number, completion
            except EngineGone:
                self.count_death()
                if len(group) > 1:
                    left = list(group.items())
                    groups += [dict(left[len(left) // 2 :]), dict(left[: len(left) // 2])]
                elif group.keys() - self.suspects:
                    self.suspects |= group.keys()
                    groups.append(group)  # once more: something else may have killed the engine just then
                elif group:
                    yield self.poison(*group)

    def poison(self, number: int) -> tuple[int, Completion]:
        self.poisoned += 1
        if self.poisoned > MOST_POISON:
            raise EngineError(self.engine.failure_message(f"died at {self.poisoned} different rows"))
        self.unfinished.pop(number)
        return number, Completion.failed("engine_failed", POISON)

    def refuse_broken_engine(self) -> None:
        """Raises:
        EngineError: The engine dies at a row of one letter.
        """
        probe = CompletionRequest(self.engine.model.name, "a", SamplingParams(max_tokens=1))
        try:
            for _, completion in self.exchange({PROBE: probe}, alone=True):
                self.engine.device_time.told(0.0, 0.0, completion.usage.device_seconds)  # nobody's row
        except EngineGone:
            raise EngineError(self.engine.failure_message("died twice")) from None

    def exchange(
        self, unfinished: Rows, feed: Iterator[tuple[int, CompletionRequest]] | None = None, alone: bool = False
    ) -> Iterator[tuple[int, Completion]]:
        """Exchange rows on a connection of its own. `alone`: while no row of another stream runs.

        Raises:
            EngineGone: The child died or was killed; `unfinished` has the rows that were in flight.
        """
        link = None
        try:
            link, window = self.connect_alone() if alone else self.engine.connect(self.tenant)
            yield from self.exchange_rows(link, window, iter(()) if feed is None else feed, unfinished)
        finally:
            if link is not None:
                if unfinished:
                    self.stop_rows(link)
                link.close()

    def connect_alone(self) -> tuple[Link, int]:
        """A connection whose rows run alone. A child that dies before that died at rows of other streams."""
        unborn = 0  # children in a row that died before their model was loaded
        for _ in range(MOST_DEATHS):
            link = None
            try:
                link, window = self.engine.connect(self.tenant)
                self.get_alone(link)
                return link, window
            except BaseException as error:
                if link is not None:
                    link.close()
                if not isinstance(error, EngineGone):
                    raise
                unborn = 0 if link is not None else unborn + 1
            if unborn == MOST_UNBORN:
                break
        raise EngineError(self.engine.failure_message("died again and again"))

    def get_alone(self, link: Link) -> None:
        link.send({"alone": True})
        self.watch.begin()
        while not self.is_abandoned():
            if self.receive(link).get("alone"):
                return

    def receive(self, link: Link) -> dict[str, Any]:
        """The next message; {} if none came so soon. A child that hangs is killed."""
        message = link.receive(LOOK_SECONDS)
        if message:
            self.watch.heard()
        else:
            self.watch.look(link)
        return message

    def exchange_rows(
        self, link: Link, window: int, feed: Iterator[tuple[int, CompletionRequest]], unfinished: Rows
    ) -> Iterator[tuple[int, Completion]]:
        """Keep the window full and yield finished rows."""
        sender = RowSender(link)
        sender.send(list(unfinished.items()))
        exhausted = False
        self.watch.begin()
        while unfinished or not exhausted:
            while not exhausted and len(unfinished) < window:
                rows = list(islice(feed, min(CHUNK_ROWS, window - len(unfinished))))
                exhausted = not rows
                good = [row for row in rows if is_sendable(row[1])]
                unfinished.update(good)
                sender.send(good)
                if len(good) < len(rows):
                    for number in sorted({number for number, _ in rows} - {number for number, _ in good}):
                        yield number, Completion.failed("invalid_request", UNSENDABLE)
                if link.readable():
                    break
            if self.is_abandoned():
                return
            if unfinished:
                yield from self.answers(link, unfinished)

    def answers(self, link: Link, unfinished: Rows) -> Iterator[tuple[int, Completion]]:
        """The answers of the child's next message."""
        message = self.receive(link)
        for number, piece, *tokens in message.get("text", ()):
            if (tell := unfinished[number].tell) is not None:
                tell(piece, Usage(*tokens))
        if "meter" in message:
            self.engine.device_time.told(*message["meter"])
        link.answers.extend(message.get("done", ()))
        while link.answers:
            number, *answer = link.answers.popleft()
            request = unfinished.pop(number)
            yield number, checked(completion_of(answer, request.choices), request)

    def stop_rows(self, link: Link) -> None:
        """Abort the rows under way. Device time of answers that arrive from now on is lost, as that of aborted rows."""
        unread, until = list(link.answers), time.monotonic() + METER_SECONDS
        device_time = self.engine.device_time
        try:
            link.send({"stop": True})
            while message := link.receive(max(0.0, until - time.monotonic())):
                unread += message.get("done", ())
                if "meter" in message:
                    device_time.told(*message["meter"])
                if "stopped" in message:
                    break
        except EngineGone:
            pass  # the child died: time that it had not reported is unknown
        device_time.told(0.0, 0.0, sum(usage_of(answer).device_seconds for _, *answer in unread))


class HangWatch:
    """Kills a child that is silent for many times its own pace. Only time in which we wait for it counts."""

    def __init__(self) -> None:
        self.longest: float | None = None  # silence before a message, since this stream began
        self.silent = 0.0

    def begin(self) -> None:
        """A new connection: the child may be a new one, whose first step takes longer."""
        self.longest, self.silent = None, 0.0

    def heard(self) -> None:
        self.longest, self.silent = max(self.longest or 0.0, self.silent), 0.0

    def look(self, link: Link) -> None:
        """Raises:
        EngineGone: The child hangs and was killed.
        """
        self.silent += LOOK_SECONDS
        bound = FIRST_STEP_SECONDS if self.longest is None else max(HANG_SECONDS, HANG_TIMES * self.longest)
        if self.silent > bound and link.child is not None:
            with suppress(ProcessLookupError):
                os.killpg(link.child, signal.SIGKILL)  # it leads its session: vLLM's own workers end too
            raise EngineGone


def is_abandoned(requests: Iterable[CompletionRequest]) -> bool:
    return bool(getattr(requests, "abandoned", False))
