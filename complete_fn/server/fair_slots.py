"""Few requests of a kind run at a time, and tenants share them: no tenant can take the last slots of a kind.

Chats hold a thread while an engine answers, requests on tables a window of rows in memory, reports a connection to the
store.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Annotated, TypeVar

import anyio
from anyio import to_thread
from fastapi import Depends, Request

from complete_fn.errors import EngineBusyError
from complete_fn.interrupts import abandonable, end_if_abandoned

GONE_SECONDS = 0.25  # between two looks whether a client is gone
T = TypeVar("T")


class FairSlots:
    """Runs work on threads. A request that waits for a slot holds no thread. For one event loop.

    A slot that becomes free goes to the tenant that holds the fewest, and among those to the one whose turn is longest
    ago. However long the work of one tenant takes, another tenant finds the spare slots.

    Args:
        of_one: slots that one tenant may hold.
        spare: further slots.
        waiting: requests of all tenants that may wait for a slot; of one tenant, half as many.
        advice: what a request is told that is refused.
    """

    def __init__(self, of_one: int, spare: int, waiting: int, advice: str) -> None:
        self.at_once, self.of_one = of_one + spare, of_one
        self.waiting, self.waiting_of_one = waiting, waiting // 2
        self.advice = advice
        self.limiter = anyio.CapacityLimiter(self.at_once)
        self.running: Counter[str] = Counter()
        self.queues: dict[str, deque[asyncio.Future[None]]] = {}  # by tenant; the first one's turn is longest ago

    def refuse_crowd(self, tenant: str) -> None:
        """Raises:
        EngineBusyError: Too many requests wait already.
        """
        mine = len(self.queues.get(tenant, ()))
        everybody = sum(map(len, self.queues.values()))
        if mine >= self.waiting_of_one or everybody >= self.waiting:
            count = mine if mine >= self.waiting_of_one else everybody
            raise EngineBusyError(f"{count} requests wait already. {self.advice}").for_everybody()

    async def run(self, tenant: str, work: Callable[[], T], abandon_on_cancel: bool = False) -> T:
        """Raises:
        EngineBusyError: Too many requests wait already.
        """
        async with self.slot(tenant):
            return await to_thread.run_sync(work, limiter=self.limiter, abandon_on_cancel=abandon_on_cancel)

    @asynccontextmanager
    async def slot(self, tenant: str) -> AsyncIterator[None]:
        if self.running.total() < self.at_once and self.running[tenant] < self.of_one:
            self.running[tenant] += 1
        else:
            self.refuse_crowd(tenant)
            await self.turn(tenant)
        try:
            yield
        finally:
            self.release(tenant)

    def release(self, tenant: str) -> None:
        self.running[tenant] -= 1
        if not self.running[tenant]:
            del self.running[tenant]
        self.hand_out()

    async def turn(self, tenant: str) -> None:
        mine: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.queues.setdefault(tenant, deque()).append(mine)
        try:
            await mine
        except asyncio.CancelledError:
            if mine.done() and not mine.cancelled():  # the slot came together with the cancellation
                self.release(tenant)
            elif mine in (queue := self.queues.get(tenant, deque())):
                queue.remove(mine)
                if not queue:
                    del self.queues[tenant]
            raise

    def hand_out(self) -> None:
        """Give free slots to those that wait."""
        while self.running.total() < self.at_once:
            eligible = [tenant for tenant in self.queues if self.running[tenant] < self.of_one]
            if not eligible:
                return
            tenant = min(eligible, key=lambda name: self.running[name])  # of several the first: see `queues`
            queue = self.queues.pop(tenant)
            mine = queue.popleft()
            if queue:
                self.queues[tenant] = queue  # now the last one in order
            if not mine.cancelled():
                self.running[tenant] += 1
                mine.set_result(None)


CHATS_OF_ONE = 64  # an engine answers about so many prompts at a time


class Lanes:
    """The slots of a service's process, by kind."""

    def __init__(self) -> None:
        self.chats = FairSlots(CHATS_OF_ONE, 32, 512, "Try again in a moment, or use a job.")
        self.tables = FairSlots(2, 1, 64, "They read or write tables. Try again when one has ended.")
        self.reports = FairSlots(3, 2, 64, "They are lists or sums of the store. Try again in a moment.")


class RequestSlots:
    """The slots of one kind, for one request. Its work ends when its client leaves."""

    def __init__(self, slots: FairSlots, request: Request) -> None:
        self.slots, self.request = slots, request

    async def run(self, tenant: str, work: Callable[[], T]) -> T:
        """Raises:
        EngineBusyError: Too many requests wait already.
        Abandoned: The client has left.
        """
        gone = threading.Event()

        def work_for_client() -> T:
            with abandonable(gone):
                end_if_abandoned()
                return work()

        watcher = asyncio.create_task(self.watch(gone))
        try:
            return await self.slots.run(tenant, work_for_client)
        finally:
            watcher.cancel()

    async def watch(self, gone: threading.Event) -> None:
        while not await self.request.is_disconnected():
            await anyio.sleep(GONE_SECONDS)
        gone.set()


class RequestLanes:
    """The slots of a service's process, for one request."""

    def __init__(self, lanes: Lanes, request: Request) -> None:
        self.tables = RequestSlots(lanes.tables, request)
        self.reports = RequestSlots(lanes.reports, request)


async def lanes_of(request: Request) -> RequestLanes:
    return RequestLanes(request.app.state.lanes, request)


LanesOf = Annotated[RequestLanes, Depends(lanes_of)]
