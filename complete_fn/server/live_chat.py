"""`Live` gives a request's pieces of text while they are computed, then the rows, or the reason why there are none."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from contextlib import suppress

import anyio
from fastapi import Request

from complete_fn.engines.call import Call
from complete_fn.engines.stoppable import Stopped
from complete_fn.server.fair_slots import GONE_SECONDS, Lanes
from complete_fn.server.rate_limits import Grant
from complete_fn.server.replies import Detail
from complete_fn.service.engine_host import EngineHost
from complete_fn.text import text_column
from complete_fn.tokens import tokens_by_bytes
from complete_fn.types import Asker, Usage

Piece = tuple[int, str]  # row, new text


class Live:
    """Runs prompts on its own thread. The rows stop if the client goes away.

    Then a row of which the client has read a piece is billed up to that piece; other unfinished rows are not billed.
    """

    def __init__(self, request: Request, engines: EngineHost, call: Call, prompts: list[str], who: Asker) -> None:
        self.request, self.engines = request, engines
        self.call, self.prompts, self.who = call, prompts, who
        self.stop = threading.Event()
        self.loop = asyncio.get_running_loop()
        self.pieces: asyncio.Queue[Piece | None] = asyncio.Queue()  # None marks the end
        self.rows: list[Detail] = []
        self.told: dict[int, int] = {}  # by row, the tokens up to its last piece
        self.failure: BaseException | None = None
        self.task: asyncio.Task[None] | None = None

    def start(self, grant: Grant, priority: int, streaming: bool) -> None:
        """Run the prompts and settle the grant when they end. If the client left, a row counts at least its prompt."""
        chats = self.lanes.chats

        def work() -> None:
            column, tell = text_column(self.prompts), self.tell if streaming else None
            answers = self.engines.complete(self.call, column, self.who, self.stop, priority=priority, tell=tell)
            self.rows.extend(answers.details.to_pylist())

        async def run() -> None:
            try:
                await chats.run(self.who.tenant, work, abandon_on_cancel=True)
            except BaseException as error:
                self.stop.set()
                self.failure = error
                if isinstance(error, asyncio.CancelledError):
                    raise
            finally:
                try:
                    await grant.settled(self.used)
                finally:
                    self.pieces.put_nowait(None)

        self.task = asyncio.create_task(run())

    @property
    def lanes(self) -> Lanes:
        lanes: Lanes = self.request.app.state.lanes
        return lanes

    @property
    def prompt_tokens(self) -> int:
        return sum(tokens_by_bytes(self.prompts))

    @property
    def most_tokens(self) -> int:
        """The tokens that the request may use, estimated from its prompts and the longest answers."""
        answer = min(self.call.sampling.max_tokens or math.inf, self.call.model.default_max_tokens)
        return self.prompt_tokens + int(answer) * len(self.prompts)

    @property
    def used(self) -> int:
        """The tokens that count against a rate limit. If the client left, a row counts at least its prompt."""
        if self.failure is None:
            return sum(map(computed_tokens, self.rows))
        prompts = tokens_by_bytes(self.prompts)
        return sum(max(prompt, self.told.get(row, 0)) for row, prompt in enumerate(prompts))

    def tell(self, row: int, piece: str, usage: Usage) -> None:
        """Queue a row's next piece. The engine's thread calls this."""
        self.told[row] = usage.prompt_tokens + usage.completion_tokens
        with suppress(RuntimeError):  # the event loop is closed, because the service ends
            self.loop.call_soon_threadsafe(self.pieces.put_nowait, (row, piece))

    async def first(self) -> Piece | None:
        """The first piece; None if the run ends before a piece. A client that goes away stops the rows."""
        watcher = asyncio.create_task(self.watch())
        began = time.monotonic()
        try:
            piece = await self.pieces.get()
            if self.failure is None:
                self.waited(time.monotonic() - began)
            return piece
        except asyncio.CancelledError:
            self.stop.set()
            raise
        finally:
            watcher.cancel()

    async def watch(self) -> None:
        while not await self.request.is_disconnected():
            await anyio.sleep(GONE_SECONDS)
        self.stop.set()

    def waited(self, seconds: float) -> None:
        metrics = getattr(self.request.app.state, "metrics", None)
        if metrics is not None:
            metrics.first_token.labels(self.call.model.name).observe(seconds)

    @property
    def left(self) -> bool:
        return isinstance(self.failure, Stopped)

    def outcome(self) -> list[Detail]:
        """The rows, after the last piece.

        Raises:
            CompleteError, Exception: The run failed.
        """
        if self.failure is not None:
            raise self.failure
        return self.rows


def computed_tokens(row: Detail) -> int:
    """Tokens that an engine computed for this row; 0 for a reused answer."""
    usage = row["usage"]
    return int(usage["prompt_tokens"] + usage["completion_tokens"]) if row["source"] == "computed" else 0
