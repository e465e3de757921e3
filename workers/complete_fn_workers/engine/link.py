"""A caller's connection to the child: it sends rows and receives answers."""

from __future__ import annotations

import select
import socket
from collections import deque
from dataclasses import asdict
from typing import Any

from complete_fn.host import renew_in_child
from complete_fn.text import is_utf8
from complete_fn.types import Completion, CompletionRequest, RowError, Usage
from complete_fn_workers.engine.wire import RECEIVE_BYTES, Frames, pack


class EngineGone(Exception):
    """The connection to the child broke."""


class Link:
    """One connection to the child. Not for several threads at once."""

    def __init__(self, link: socket.socket) -> None:
        self.link = link
        self.child: int | None = None  # the child's process; known after its greeting
        self.frames = Frames()
        self.messages: list[dict[str, Any]] = []
        self.answers: deque[list[Any]] = deque()  # received and not yet given out
        self.poll = select.poll()
        self.poll.register(link, select.POLLIN)
        renew_in_child(self)

    def send(self, message: dict[str, Any]) -> None:
        try:
            self.link.sendall(pack(message))
        except OSError as error:
            raise EngineGone from error

    def receive(self, seconds: float | None = None) -> dict[str, Any]:
        """Wait for the next message; {} if none came within `seconds`."""
        while not self.messages:
            if seconds is not None and not self.poll.poll(seconds * 1000):
                return {}
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
            return True  # the connection is broken: the next `receive` raises

    def close(self) -> None:
        self.link.close()

    def after_fork(self) -> None:
        """Close the forked process's copy of the connection: it would keep the engine alive."""
        self.close()


class RowSender:
    """Writes rows; options travel only when they change."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.last: tuple[Any, ...] | None = None

    def send(self, rows: list[tuple[int, CompletionRequest]]) -> None:
        if rows:
            self.link.send({"rows": [self.row(number, request) for number, request in rows]})

    def row(self, number: int, request: CompletionRequest) -> list[Any]:
        prompt = request.prompt
        row: list[Any] = [number, prompt if isinstance(prompt, str) else [[m.role, m.content] for m in prompt]]
        how = {
            "response_format": request.response_format,
            "choices": request.choices,
            "priority": request.priority,
            "tell": request.tell is not None,
        }
        kind = (request.sampling, *how.values())
        if kind != self.last:
            self.last = kind
            row.append({**asdict(request.sampling), **how})
        return row


def is_sendable(request: CompletionRequest) -> bool:
    """Whether the prompt is text that can be encoded, and there is a prompt at all."""
    parts = [request.prompt] if isinstance(request.prompt, str) else [m.content for m in request.prompt]
    return bool(parts) and all(map(is_utf8, parts))


def completion_of(answer: list[Any], choices: tuple[str, ...]) -> Completion:
    text, finish_reason, code, message, scores = answer[:5]
    error = RowError(code, message) if code is not None else None
    of_label = None if scores is None else dict(zip(choices, scores, strict=True))
    return Completion(text, finish_reason, error, usage_of(answer), scores=of_label)


def usage_of(answer: list[Any]) -> Usage:
    return Usage(*answer[5:])
