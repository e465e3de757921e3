"""The caller's side of the embedded engine: vLLM runs in a child process of ours, reached over a Unix socket.

All threads of this process and other processes of the same user share the child. It ends after its last connection has
closed, also when the caller was killed (see `launch`). This module imports neither torch nor vllm.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from itertools import islice
from typing import Any

from complete_fn.engines.catalogue import Model
from complete_fn.engines.structured_output import checked
from complete_fn.engines.tokenizer import count_with, tokenizer_file
from complete_fn.errors import EngineError
from complete_fn.history.device_time import DeviceTime
from complete_fn.host import here, renew_in_child
from complete_fn.settings import Settings
from complete_fn.text import is_utf8, without_surrogates
from complete_fn.types import Completion, CompletionRequest, RowError, Usage
from complete_fn_workers.engine.launch import (
    EnginePlace,
    connect_if_running,
    engine_place,
    engine_spec,
    join_engine,
    log_tail,
)
from complete_fn_workers.engine.wire import RECEIVE_BYTES, Frames, pack

CHUNK_ROWS = 32
LOOK_SECONDS = 0.2  # how often a waiting stream checks whether its caller has abandoned it
METER_SECONDS = 5.0  # wait for the child's meter: it answers between two steps
UNSENDABLE = "The prompt has no messages, or a lone surrogate (half of a character) that cannot be encoded."


class EngineGone(Exception):
    """The connection to the child broke."""


class Link:
    """One connection to the child. Not for several threads at once."""

    def __init__(self, link: socket.socket) -> None:
        self.link = link
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
        self.device: str | None = None  # what the child runs on; known after its greeting
        self.device_time = DeviceTime(self.read_meter)

    def stream(self, requests: Iterable[CompletionRequest], tenant: str) -> Iterator[tuple[int, Completion]]:
        """As in `Engine.stream`. At most 2 x max_num_seqs requests are in flight; a dead child is restarted once."""
        feed = enumerate(requests)
        unfinished: dict[int, CompletionRequest] = {}
        for attempt in (1, 2):
            link = None
            try:
                link, window = self.connect(tenant)
                yield from exchange_rows(
                    link, window, feed, unfinished, partial(is_abandoned, requests), self.device_time
                )
                return
            except EngineGone:
                if attempt == 2:
                    raise EngineError(self.failure_message("died twice")) from None
                if any(request.tell is not None for request in unfinished.values()):
                    raise EngineError(self.failure_message("died while its answer was being read")) from None
            finally:
                if link is not None:
                    if unfinished:
                        stop_rows(link, self.device_time)
                    link.close()

    def connect(self, tenant: str) -> tuple[Link, int]:
        """Open a connection for one stream. Returns the connection, and how many rows may be in flight on it."""
        self.start()
        found = connect_if_running(self.place)
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
        """Hold a connection to a living child, which keeps the child alive. Start the child if none runs."""
        with self.guard:
            if self.lifeline is not None and self.owner == os.getpid() and not has_ended(self.lifeline):
                return
            self.release()
            link, child = join_engine(self.place)
            self.child = child or self.child
            self.lifeline, self.owner = Link(link), os.getpid()

    def greeting(self, link: Link) -> dict[str, Any]:
        """Wait until the model is loaded, and note the child's process id and device.

        Raises:
            EngineError: The child cannot load the model.
        """
        message = link.receive()
        if "failed" in message:
            raise EngineError(self.failure_message(f"cannot start: {message['failed']}"))
        ready: dict[str, Any] = message["ready"]
        self.pid = int(ready["pid"])
        self.device = str(ready["device"])
        self.device_time.name = f"{here()}/{self.pid}"
        self.device_time.skipped = float(ready["skipped"])
        return ready

    def read_meter(self) -> None:
        """Ask the child for its device time up to now; do nothing if no child runs."""
        if self.pid is None or self.lifeline is None or has_ended(self.lifeline):
            return
        with suppress(EngineGone, EngineError):
            link, _ = self.connect("")
            try:
                link.send({"meter": True})
                self.device_time.told(*link.receive(METER_SECONDS).get("meter", (0.0, 0.0, 0.0)))
            finally:
                link.close()

    def failure_message(self, what: str) -> str:
        end = self.child.poll() if self.child is not None else None
        if end is not None and end < 0:
            what += f" (signal {-end}{'; perhaps out of memory' if end == -signal.SIGKILL else ''})"
        tail = log_tail(self.place.log)
        return f"The engine of model {self.model.name!r} {what}\nThe end of its log {str(self.place.log)!r}:\n{tail}"

    def count_tokens(self, texts: list[str]) -> list[int]:
        """Count by the tokenizer.json on this machine, or if there is none, by the child."""
        file = tokenizer_file(self.model)
        if file is not None:
            return count_with(file, texts)
        link, _ = self.connect("")
        try:
            link.send({"count": [without_surrogates(text) for text in texts]})
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


def has_ended(link: Link) -> bool:
    """Whether the child has closed its side of the lifeline. The greeting that arrives there is dropped."""
    try:
        while link.link.recv(RECEIVE_BYTES, socket.MSG_DONTWAIT):
            continue
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def exchange_rows(
    link: Link,
    window: int,
    feed: Iterator[tuple[int, CompletionRequest]],
    unfinished: dict[int, CompletionRequest],
    abandoned: Callable[[], bool],
    device_time: DeviceTime,
) -> Iterator[tuple[int, Completion]]:
    """Keep the window full and yield finished rows. `unfinished` has the rows in flight, even after the child died."""
    sender = RowSender(link)
    sender.send(list(unfinished.items()))
    exhausted = False
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
        if abandoned():
            return
        if unfinished:
            message = link.receive(LOOK_SECONDS)
            for number, piece, *tokens in message.get("text", ()):
                if (tell := unfinished[number].tell) is not None:
                    tell(piece, Usage(*tokens))
            if "meter" in message:
                device_time.told(*message["meter"])
            link.answers.extend(message.get("done", ()))
            while link.answers:
                number, *answer = link.answers.popleft()
                request = unfinished.pop(number)
                yield number, checked(completion_of(answer, request.choices), request)


def stop_rows(link: Link, device_time: DeviceTime) -> None:
    """Abort the rows under way. Device time of answers that arrive from now on is lost, like that of aborted rows."""
    unread, until = list(link.answers), time.monotonic() + METER_SECONDS
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


def is_abandoned(requests: Iterable[CompletionRequest]) -> bool:
    return bool(getattr(requests, "abandoned", False))


def is_sendable(request: CompletionRequest) -> bool:
    """Whether the prompt is text that can be encoded, and there is a prompt at all."""
    parts = [request.prompt] if isinstance(request.prompt, str) else [m.content for m in request.prompt]
    return bool(parts) and all(map(is_utf8, parts))


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


def completion_of(answer: list[Any], choices: tuple[str, ...]) -> Completion:
    text, finish_reason, code, message, scores = answer[:5]
    error = RowError(code, message) if code is not None else None
    of_label = None if scores is None else dict(zip(choices, scores, strict=True))
    return Completion(text, finish_reason, error, usage_of(answer), scores=of_label)


def usage_of(answer: list[Any]) -> Usage:
    return Usage(*answer[5:])


def open_engine(model: Model, settings: Settings) -> EmbeddedEngine:
    """The engine for a catalogue entry. It starts nothing yet.

    Raises:
        UnknownModelError: The entry's folder is not a model.
        EngineError: The state folder cannot be used.
    """
    return EmbeddedEngine(model, engine_place(engine_spec(model, settings), settings))
