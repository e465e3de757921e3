"""The caller's side of the embedded engine: vLLM runs in a child process of ours, reached over a Unix socket.

All threads of this process and other processes of the same user share the child. It ends after its last connection has
closed, also when the caller was killed (see `launch`). This module imports neither torch nor vllm.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any

from complete_fn.engines.catalogue import Model
from complete_fn.engines.tokenizer import count_with, tokenizer_file
from complete_fn.errors import EngineError
from complete_fn.history.device_time import DeviceTime
from complete_fn.host import here
from complete_fn.settings import Settings
from complete_fn.text import without_surrogates
from complete_fn.types import Completion, CompletionRequest
from complete_fn_workers.engine.launch import (
    EnginePlace,
    connect_if_running,
    engine_place,
    engine_spec,
    join_engine,
    log_tail,
)
from complete_fn_workers.engine.link import EngineGone, Link
from complete_fn_workers.engine.stream import METER_SECONDS, EngineStream
from complete_fn_workers.engine.wire import RECEIVE_BYTES


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
        """As in `Engine.stream`. At most 2 x max_num_seqs requests are in flight; `EngineStream` restarts the child."""
        return EngineStream(self, requests, tenant).rows()

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
        self.pid = link.child = int(ready["pid"])
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


def open_engine(model: Model, settings: Settings) -> EmbeddedEngine:
    """The engine for a catalogue entry. It starts nothing yet.

    Raises:
        UnknownModelError: The entry's folder is not a model.
        EngineError: The state folder cannot be used.
    """
    return EmbeddedEngine(model, engine_place(engine_spec(model, settings), settings))
