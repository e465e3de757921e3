"""The embedded engine as its parents see it: vLLM in a child process of ours, reached over a Unix socket.

The child is shared by all threads of this process and by other processes of the same user, and ends when the last of
them has let go, however it did (see `engine_launch`). Imports neither torch nor vllm.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from itertools import islice
from typing import Any

from complete_fn.catalogue import Model
from complete_fn.errors import EngineError
from complete_fn.settings import Settings
from complete_fn.structured import checked
from complete_fn.token_counts import count_with, encodable, tokenizer_file
from complete_fn.types import Completion, CompletionRequest, RowError, Usage
from complete_fn_workers.engine_launch import EnginePlace, engine_place, engine_spec, join_engine, knock, log_tail
from complete_fn_workers.engine_wire import RECEIVE_BYTES, Frames, pack

CHUNK_ROWS = 32
UNSENDABLE = "The prompt has no messages, or a lone surrogate (half of a character) that cannot be encoded."


class EngineGone(Exception):
    """The connection to the child broke."""


class Link:
    """One connection to the child. Not for several threads at once."""

    def __init__(self, link: socket.socket) -> None:
        self.link = link
        self.frames = Frames()
        self.messages: list[dict[str, Any]] = []
        links.add(self)

    def send(self, message: dict[str, Any]) -> None:
        try:
            self.link.sendall(pack(message))
        except OSError as error:
            raise EngineGone from error

    def receive(self) -> dict[str, Any]:
        """The next message; waits for it."""
        while not self.messages:
            try:
                received = self.link.recv(RECEIVE_BYTES)
            except OSError as error:
                raise EngineGone from error
            if not received:
                raise EngineGone
            self.messages = self.frames.feed(received)
        return self.messages.pop(0)

    def readable(self) -> bool:
        try:
            return bool(self.messages) or self.link.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) is not None
        except BlockingIOError:
            return False
        except OSError:
            return True  # broken, which the next `receive` says

    def close(self) -> None:
        self.link.close()


links: weakref.WeakSet[Link] = weakref.WeakSet()


def close_inherited() -> None:
    """In a forked child of the parent: its copies of the connections must not keep the engine alive."""
    for link in links:
        link.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=close_inherited)


class EmbeddedEngine:
    """vLLM on this machine, behind the `Engine` protocol. The child, `pid`, starts with the first row."""

    def __init__(self, model: Model, place: EnginePlace) -> None:
        self.model = model
        self.place = place
        self.guard = threading.Lock()
        self.lifeline: Link | None = None
        self.child: subprocess.Popen[bytes] | None = None
        self.owner = os.getpid()
        self.pid: int | None = None

    def stream(self, requests: Iterable[CompletionRequest], tenant: str) -> Iterator[tuple[int, Completion]]:
        """As in `Engine.stream`. At most 2 x max_num_seqs requests are in flight; a dead child is restarted once."""
        feed = enumerate(requests)
        unfinished: dict[int, CompletionRequest] = {}
        for attempt in (1, 2):
            link = None
            try:
                link, window = self.connect(tenant)
                yield from exchange(link, window, feed, unfinished)
                return
            except EngineGone:
                if attempt == 2:
                    raise EngineError(self.obituary("died twice")) from None
            finally:
                if link is not None:
                    link.close()

    def connect(self, tenant: str) -> tuple[Link, int]:
        """A connection of its own for a stream, and how many rows may be in flight on it."""
        self.start()
        found = knock(self.place)
        if found is None:
            raise EngineGone
        link = Link(found)
        try:
            ready = self.greeting(link)
            link.send({"open": {"tenant": tenant, "default_max_tokens": self.model.default_max_tokens}})
        except BaseException:
            link.close()
            raise
        return link, 2 * int(ready["max_num_seqs"])

    def start(self) -> None:
        """Hold a connection to a living child."""
        with self.guard:
            if self.lifeline is not None and self.owner == os.getpid() and not ended(self.lifeline):
                return
            self.release()
            link, child = join_engine(self.place)
            self.child = child or self.child
            self.lifeline, self.owner = Link(link), os.getpid()

    def greeting(self, link: Link) -> dict[str, Any]:
        """Wait until the model is loaded."""
        message = link.receive()
        if "failed" in message:
            raise EngineError(self.obituary(f"cannot start: {message['failed']}"))
        ready: dict[str, Any] = message["ready"]
        self.pid = int(ready["pid"])
        return ready

    def obituary(self, what: str) -> str:
        end = self.child.poll() if self.child is not None else None
        if end is not None and end < 0:
            what += f" (signal {-end}{'; perhaps out of memory' if end == -signal.SIGKILL else ''})"
        tail = log_tail(self.place.log)
        return f"The engine of model {self.model.name!r} {what}\nThe end of its log {str(self.place.log)!r}:\n{tail}"

    def count_tokens(self, texts: list[str]) -> list[int]:
        """By the tokenizer.json on this machine; where there is none, by the child."""
        file = tokenizer_file(self.model)
        if file is not None:
            return count_with(file, texts)
        link, _ = self.connect("")
        try:
            link.send({"count": [encodable(text) for text in texts]})
            return list(link.receive()["counts"])
        finally:
            link.close()

    def release(self) -> None:
        if self.lifeline is not None:
            self.lifeline.close()
            self.lifeline = None
        if self.child is not None:
            self.child.poll()

    def close(self) -> None:
        with self.guard:
            self.release()


def ended(link: Link) -> bool:
    """Whether the child's side of the lifeline is closed. What it says there (the greeting) is of no use."""
    try:
        while link.link.recv(RECEIVE_BYTES, socket.MSG_DONTWAIT):
            continue
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def exchange(
    link: Link, window: int, feed: Iterator[tuple[int, CompletionRequest]], unfinished: dict[int, CompletionRequest]
) -> Iterator[tuple[int, Completion]]:
    """Keep the window full and yield what is done. `unfinished` has what is in flight, also when the child dies."""
    sender = RowSender(link)
    sender.send(list(unfinished.items()))
    exhausted = False
    while unfinished or not exhausted:
        while not exhausted and len(unfinished) < window:
            rows = list(islice(feed, min(CHUNK_ROWS, window - len(unfinished))))
            exhausted = not rows
            good = [row for row in rows if sendable(row[1])]
            unfinished.update(good)
            sender.send(good)
            if len(good) < len(rows):
                for number in sorted({number for number, _ in rows} - {number for number, _ in good}):
                    yield number, Completion.failed("invalid_request", UNSENDABLE)
            if link.readable():
                break
        if unfinished:
            for number, *answer in link.receive()["done"]:
                request = unfinished.pop(number)
                yield number, checked(completion(answer), request.response_format)


def sendable(request: CompletionRequest) -> bool:
    """Whether the prompt is text that can be encoded, and there is a prompt at all."""
    parts = [request.prompt] if isinstance(request.prompt, str) else [m.content for m in request.prompt]
    try:
        for part in parts:
            part.encode()
    except UnicodeEncodeError:
        return False
    return bool(parts)


class RowSender:
    """Writes rows; options travel only when they change."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.last: tuple[Any, str | None] | None = None

    def send(self, rows: list[tuple[int, CompletionRequest]]) -> None:
        if rows:
            self.link.send({"rows": [self.row(number, request) for number, request in rows]})

    def row(self, number: int, request: CompletionRequest) -> list[Any]:
        prompt = request.prompt
        row: list[Any] = [number, prompt if isinstance(prompt, str) else [[m.role, m.content] for m in prompt]]
        kind = (request.sampling, request.response_format)
        if kind != self.last:
            self.last = kind
            row.append({**asdict(request.sampling), "response_format": request.response_format})
        return row


def completion(answer: list[Any]) -> Completion:
    text, finish_reason, code, message, *usage = answer
    error = RowError(code, message) if code is not None else None
    return Completion(text, finish_reason, error, Usage(*usage))


def open_engine(model: Model, settings: Settings) -> EmbeddedEngine:
    """The engine for a catalogue entry; nothing is started yet.

    Raises:
        UnknownModelError: the entry's folder is not a model.
        EngineError: the state folder cannot be used.
    """
    return EmbeddedEngine(model, engine_place(engine_spec(model, settings), settings))
