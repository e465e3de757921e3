"""The child's connections to its callers. One thread accepts, reads, writes, and ends the child after the last."""

from __future__ import annotations

import contextlib
import fcntl
import os
import queue
import selectors
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any, NoReturn

from complete_fn_workers.engine.wire import RECEIVE_BYTES, Frames, pack

LINGER_S = 1.0  # the child ends after this time without a connection, so that a shell loop's next command finds it
TICK_S = 0.25  # between two checks whether the child should end


class EngineConnection:
    """One stream of one parent. `tenant`, `default_max_tokens` and `options` come from its last messages."""

    def __init__(self, link: socket.socket) -> None:
        link.setblocking(False)
        self.link = link
        self.frames = Frames()
        self.unsent = bytearray()
        self.closed = False
        self.tenant = ""
        self.default_max_tokens = 512
        self.options: Any = None


class EngineConnections:
    """All connections. `inbox` gets (connection, message), and (connection, None) when a connection has closed."""

    def __init__(self, listener: socket.socket, parent: socket.socket, files: tuple[Path, Path]) -> None:
        listener.setblocking(False)
        self.listener = listener
        self.socket_file, self.lock_file = files
        self.inbox: queue.SimpleQueue[tuple[EngineConnection, dict[str, Any] | None]] = queue.SimpleQueue()
        self.open: set[EngineConnection] = set()
        self.greeting: bytes | None = None
        self.guard = threading.Lock()
        self.selector = selectors.DefaultSelector()
        self.alarm, self.bell = socket.socketpair()
        self.alarm.setblocking(False)
        self.bell.setblocking(False)
        self.selector.register(listener, selectors.EVENT_READ)
        self.selector.register(self.alarm, selectors.EVENT_READ)
        self.alone_since = time.monotonic()
        self.admit(parent)
        threading.Thread(target=self.run, name="connections", daemon=True).start()

    def greet(self, message: dict[str, Any]) -> None:
        """Send the message to every connection, including those that open later."""
        with self.guard:
            self.greeting = pack(message)
            everyone = list(self.open)
        for connection in everyone:
            self.write(connection, self.greeting)

    def send(self, connection: EngineConnection, message: dict[str, Any]) -> None:
        self.write(connection, pack(message))

    def write(self, connection: EngineConnection, frame: bytes) -> None:
        """Send the bytes that the socket takes now. The rest follows when this caller reads, and delays no other."""
        with self.guard:
            if connection.closed:
                return
            if not connection.unsent:
                try:
                    frame = frame[connection.link.send(frame) :]
                except BlockingIOError:
                    pass
                except OSError:
                    return  # the reading thread notices and drops the connection
            if frame:
                connection.unsent += frame
                with contextlib.suppress(BlockingIOError):  # the bell rings already
                    self.bell.send(b"!")

    def drained(self, seconds: float) -> None:
        """Wait until everything is sent, at most so long."""
        until = time.monotonic() + seconds
        while any(c.unsent for c in list(self.open)) and time.monotonic() < until:
            time.sleep(0.02)

    def run(self) -> None:
        try:
            self.serve()
        finally:
            end_process()  # a child that no caller can reach must not stay alive

    def serve(self) -> None:
        while True:
            for key, events in self.selector.select(TICK_S):
                if key.fileobj is self.listener:
                    self.accept()
                elif key.fileobj is self.alarm:
                    self.await_writable()
                else:
                    if events & selectors.EVENT_WRITE:
                        self.flush(key.data)
                    if events & selectors.EVENT_READ:
                        self.read(key.data)
            if self.open:
                self.alone_since = time.monotonic()
            elif time.monotonic() - self.alone_since > LINGER_S:
                self.leave()

    def accept(self) -> None:
        try:
            link, _ = self.listener.accept()
        except OSError:  # the caller is gone, or no file descriptor is free and the next select tries again
            return
        self.admit(link)

    def admit(self, link: socket.socket) -> None:
        connection = EngineConnection(link)
        self.selector.register(link, selectors.EVENT_READ, connection)
        with self.guard:
            self.open.add(connection)
            greeting = self.greeting
        if greeting is not None:
            self.write(connection, greeting)

    def read(self, connection: EngineConnection) -> None:
        try:
            received = connection.link.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            received = b""
        if not received:
            self.drop(connection)
            return
        try:
            for message in connection.frames.feed(received):
                self.inbox.put((connection, message))
        except ValueError:  # the bytes are not of our protocol
            self.drop(connection)

    def drop(self, connection: EngineConnection) -> None:
        if connection.closed:
            return
        self.selector.unregister(connection.link)
        with self.guard:
            connection.closed = True
            connection.unsent.clear()
            connection.link.close()
            self.open.discard(connection)
        self.inbox.put((connection, None))

    def await_writable(self) -> None:
        self.alarm.recv(RECEIVE_BYTES)
        for connection in list(self.open):
            if connection.unsent:
                self.selector.modify(connection.link, selectors.EVENT_READ | selectors.EVENT_WRITE, connection)

    def flush(self, connection: EngineConnection) -> None:
        with self.guard:
            try:
                del connection.unsent[: connection.link.send(connection.unsent)]
            except OSError:
                return
            if not connection.unsent:
                self.selector.modify(connection.link, selectors.EVENT_READ, connection)

    def leave(self) -> None:
        """End the child, unless a caller is connecting: a connecting caller holds the lock."""
        try:
            lock = self.lock_file.open("w")
        except OSError:  # the folder is gone: no caller can find this child any more
            end_process()
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return
            self.accept()
            if self.open:
                return
            self.socket_file.unlink(missing_ok=True)
            end_process()


def end_process() -> NoReturn:
    """End at once: the engine may be in the middle of a long step, and no caller waits for its answers."""
    if os.getpgid(0) == os.getpid():
        os.killpg(0, signal.SIGTERM)  # ends vLLM's workers of a tensor-parallel model too
    os._exit(0)
