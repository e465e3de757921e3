"""Streamed replies send server-sent events while the rows are computed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncIterator

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from complete_fn.server.error_replies import error_body, told
from complete_fn.server.live_chat import Live, Piece, computed_tokens
from complete_fn.server.replies import DONE, Chunks, all_refused, ending, event, refused


class EventStream(StreamingResponse):
    """The server-sent events of a run. A client that goes away stops the run."""

    def __init__(self, live: Live, chunks: Chunks, first: Piece | None) -> None:
        super().__init__(events(live, chunks, first), media_type="text/event-stream")
        self.live = live

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.live.stop.set()


async def events(live: Live, chunks: Chunks, first: Piece | None) -> AsyncIterator[str]:
    """The pieces, then the rest of each row's text and its finish reason. An error in OpenAI's form ends the stream."""
    sent: defaultdict[int, str] = defaultdict(str)
    for opening in chunks.start():
        yield opening
    piece = first
    while piece is not None:
        row, text = piece
        sent[row] += text
        yield chunks.text(row, text)
        piece = await live.pieces.get()
    if live.left:
        return
    if live.request.app.state.internal:
        yield f": tokens {sum(map(computed_tokens, live.rows))}\n\n"  # an event comment, for the API's rate limit
    for closing in endings(live, chunks, sent):
        yield closing


def endings(live: Live, chunks: Chunks, sent: dict[int, str]) -> list[str]:
    if isinstance(live.failure, Exception):
        return [event(error_body(*told(live.request, live.failure))), DONE]
    if (why := all_refused(live.rows)) is not None:
        return [event(error_body(*why)), DONE]
    closing: list[str] = []
    for number, row in enumerate(live.rows):
        value = "" if refused(row) else row["value"]
        if value.startswith(sent[number]) and len(value) > len(sent[number]):
            closing.append(chunks.text(number, value[len(sent[number]) :]))
        closing.append(chunks.finish(number, ending(row)))
    return [*closing, *chunks.end(live.rows)]
