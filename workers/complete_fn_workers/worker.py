"""`complete-fn worker` is a process that claims parts of jobs and runs them, with one engine for each model.

SIGTERM or SIGINT drains the worker: it claims no more parts and finishes the parts it holds. After a time limit, or at
a second signal, it gives the unfinished parts back, and their committed rows are kept.
"""

from __future__ import annotations

import argparse
import fcntl
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TextIO

from complete_fn.cli.main import OK, Parser, add_home
from complete_fn.errors import InvalidOptionError, StoreError
from complete_fn.host import here
from complete_fn.jobs.queue import CeleryQueue
from complete_fn.jobs.worker_store import Beat, own_id
from complete_fn.logs import logger
from complete_fn.server.worker_api import internal_secret, serve_internal
from complete_fn.service.engine_host import EngineHost
from complete_fn.service.state import ServiceState
from complete_fn.settings import load_settings
from complete_fn.worker.loop import AT_ONCE, TAILS, WorkerLoop
from complete_fn_workers.celery_messages import Messages

LOG = logger("worker")
DESCRIPTION = """\
Run the jobs of a service: claim their parts, complete them on this machine's engines, commit.

Start as many as there are accelerators, on any machine that reaches the service's state and its Redis. SIGTERM lets it
finish what it has in hand (--drain-seconds), a second one gives that back at once; other workers then go on with it."""
NO_BROKER = "A worker needs the service's Redis: give --broker redis://HOST:6379/0 or set COMPLETE_FN_BROKER."
INTERNAL_HOST = "where the API reaches this worker for chats; a private network's, 0.0.0.0 for all (default: 127.0.0.1)"
POLL_SECONDS = 10.0
LOOK_SECONDS = 0.2
MOST_WORKERS = 1024


def main(argv: list[str]) -> int:
    parser = Parser("complete-fn worker", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--broker", metavar="URL", help="Redis of the service (default: COMPLETE_FN_BROKER)")
    add("--parts", type=int, default=AT_ONCE, metavar="N", help=f"fed into an engine at once (default: {AT_ONCE})")
    add("--idle-seconds", type=float, default=300.0, metavar="S", help="let idle engines go after (default: 300)")
    add("--drain-seconds", type=float, default=20.0, metavar="S", help="to finish in after SIGTERM (default: 20)")
    add(
        "--poll-seconds",
        type=float,
        default=POLL_SECONDS,
        metavar="S",
        help="between looks for work without a message (default: 10)",
    )
    add("--parent", type=int, metavar="PID", help="the process that started it: once that has gone, end when idle")
    add("--internal-host", default="127.0.0.1", metavar="HOST", help=INTERNAL_HOST)
    add_home(parser)
    asked = parser.parse_args(argv)
    if not 1 <= asked.parts <= 64:
        raise InvalidOptionError(f"--parts {asked.parts} must be from 1 to 64.")
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.INFO)
    settings = load_settings(asked.home)
    broker = asked.broker or settings.broker
    if not broker:
        raise InvalidOptionError(NO_BROKER)
    queue = CeleryQueue(broker)
    with engine_folder(settings.home) as engine_home:
        state = ServiceState(settings.home, queue=queue)
        engines = EngineHost(state, asked.idle_seconds, engine_home)
        secret = internal_secret(settings.internal_secret, settings.home)
        internal = serve_internal(engines, asked.internal_host, secret)
        worker = Worker(engines, asked.parts, asked.poll_seconds, internal.address)
        messages = Messages(broker, state.models(), queue.bell, asked.parts + TAILS)
        try:
            worker.run(messages, asked.drain_seconds, asked.parent)
        finally:
            internal.close()
            engines.close()
    return OK


class Worker:
    """Runs a `WorkerLoop`, sends its heartbeats, and drains it at a signal."""

    def __init__(self, engines: EngineHost, at_once: int, poll_seconds: float, address: str | None = None) -> None:
        self.engines, self.state, self.address = engines, engines.state, address
        self.began = self.state.store.now()
        self.id = own_id()
        self.loop = WorkerLoop(engines, at_once, poll_seconds, self.tell)
        self.signals = 0
        self.signalled = threading.Event()

    def tell(self, in_flight: int) -> None:
        """Write the heartbeat, with the number of parts in flight."""
        now, states = self.state.store.now(), self.engines.model_states()
        if in_flight:
            self.engines.busy_at = now
        busy_at = self.engines.busy_at
        pid = os.getpid()
        draining = self.loop.draining.is_set()
        beat = Beat(self.id, here(), pid, self.began, now, busy_at, self.address, draining, in_flight, states)
        self.state.workers.beat(beat)

    def run(self, messages: Messages, drain_seconds: float, parent: int | None) -> None:
        """Run until a signal comes, the parent process is gone and this worker is idle, or the store is upgraded."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.on_signal)
        self.loop.start()
        messages.start()
        print(f"complete-fn worker {os.getpid()} takes work.", file=sys.stderr)
        while not self.signals and not self.orphaned(parent) and not self.loop.draining.is_set():
            self.signalled.wait(1.0)
        self.loop.drain()
        messages.close()
        until = time.monotonic() + drain_seconds
        while self.signals < 2 and self.loop.held() and time.monotonic() < until:
            time.sleep(LOOK_SECONDS)
        self.loop.close()
        with suppress(StoreError):
            self.state.workers.leave(self.id)

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        self.signals += 1
        self.signalled.set()

    def orphaned(self, parent: int | None) -> bool:
        idle = self.state.store.now() - self.engines.busy_at > self.engines.idle_seconds
        return parent is not None and os.getppid() != parent and idle and not self.loop.held()


@contextmanager
def engine_folder(home: Path) -> Iterator[Path]:
    """A folder for this worker's own engines: the first folder that no living worker of this machine has locked.

    Workers on one state folder do not share an engine, because each worker is started to add one.
    """
    for number in range(MOST_WORKERS):
        folder = home / "workers" / str(number)
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with (folder / "lock").open("w") as lock:
            if is_ours(lock):
                yield folder
                return
    raise InvalidOptionError(f"{MOST_WORKERS} workers run from {home}. Name another --home.")


def is_ours(lock: TextIO) -> bool:
    """Whether the file could be locked. The kernel releases the lock when this process ends."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
