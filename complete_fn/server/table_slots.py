"""Few requests may read or write tables at a time, because each holds a window of rows in memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Annotated, TypeVar

import anyio
from anyio import to_thread
from fastapi import Depends, Request

from complete_fn.errors import EngineBusyError

AT_ONCE = 2  # requests that hold a window in memory
MOST = 16  # requests of one tenant that run or wait, so that one tenant cannot fill the queue

T = TypeVar("T")


class TableSlots:
    """Runs work on tables, each in a slot. A request that waits for a slot holds no thread. For one event loop."""

    def __init__(self) -> None:
        self.limiter = anyio.CapacityLimiter(AT_ONCE)
        self.begun: Counter[str] = Counter()

    async def run(self, tenant: str, work: Callable[[], T]) -> T:
        """Raises:
        EngineBusyError: Too many requests of the tenant already run or wait.
        """
        if self.begun[tenant] >= MOST:
            raise EngineBusyError(
                f"{MOST} requests of tenant {tenant!r} read or write tables already. Try again when one has ended."
            )
        self.begun[tenant] += 1
        try:
            return await to_thread.run_sync(work, limiter=self.limiter)
        finally:
            self.begun[tenant] -= 1
            if not self.begun[tenant]:
                del self.begun[tenant]


async def slots_of(request: Request) -> TableSlots:
    slots: TableSlots = request.app.state.tables
    return slots


Tables = Annotated[TableSlots, Depends(slots_of)]
