"""An API process keeps a fleet of worker processes: it starts them when there is work and stops them when idle."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from complete_fn.host import here
from complete_fn.jobs.worker_store import SILENT_SECONDS, Beat, WorkerStore
from complete_fn.logs import logger
from complete_fn.settings import Settings, child_environment
from complete_fn.worker.scaling import desired_workers

LOG = logger("fleet")
STEADY_SECONDS = 60.0  # a worker that lived longer did not fail at its start, so the crash count begins anew
LONGEST_PAUSE = 60.0  # seconds after a crash until the next start, at most
HUNG_SECONDS = 90.0  # a living process without a heartbeat for so long is killed
DRAIN_SECONDS = 30.0  # that workers get to drain before they are killed
WANTED_SECONDS = 60.0  # how long a request of a model, without a job, counts as a need of a worker


class Process(Protocol):
    """The members of `subprocess.Popen` that a fleet uses."""

    pid: int

    def poll(self) -> int | None: ...
    def terminate(self) -> None: ...
    def kill(self) -> None: ...
    def wait(self, timeout: float | None = None) -> int: ...


class Starter(Protocol):
    def __call__(self, slot: int) -> Process:
        """Args: slot: a number below the fleet's `most` that no other living child has."""
        ...


@dataclass
class Child:
    process: Process
    began: float
    heard: float
    slot: int
    stopping: bool = False


class Fleet:
    """Keeps as many worker processes as `desired_workers` says. Other fleets' workers on the same store count too.

    A worker is stopped if there are too many and it was idle for `idle_seconds`. A worker that crashes is replaced,
    after a pause that doubles with each crash.
    """

    def __init__(
        self, workers: WorkerStore, start: Starter, least: int, most: int, idle_seconds: float = 300.0
    ) -> None:
        self.workers, self.start = workers, start
        self.least, self.most, self.idle_seconds = least, most, idle_seconds
        self.children: dict[int, Child] = {}
        self.crashes = 0
        self.not_before = 0.0
        self.looked = time.monotonic()
        self.wanted: dict[str, float] = {}
        self.lock = threading.Lock()

    def want(self, model: str) -> None:
        """Note that a caller waits for an answer of this model, so that a worker is started."""
        with self.lock:
            self.wanted[model] = time.monotonic() + WANTED_SECONDS

    def adjust(self) -> None:
        """Remove ended workers, kill hung ones, then start or stop some as needed. Called about every second."""
        now = time.monotonic()
        self.reap(now)
        beats = self.workers.alive()
        self.end_hung(beats, now)
        up = [beat for beat in beats if not beat.draining]
        here = [beat for beat in up if self.child(beat)]
        mine = sum(not child.stopping for child in self.children.values())
        lacking = self.desired(len(up), now) - (len(up) - len(here)) - mine
        if lacking > 0 and now >= self.not_before:
            for _ in range(min(lacking, self.most - len(self.children))):
                self.add(now)
        elif lacking < 0:
            self.stop_idle(here, -lacking)

    def child(self, beat: Beat) -> Child | None:
        return self.children.get(beat.pid) if beat.host == here() else None

    def desired(self, warm: int, now: float) -> int:
        with self.lock:
            self.wanted = {model: until for model, until in self.wanted.items() if until > now}
            tokens = dict.fromkeys(self.wanted, 0)
        tokens |= {model: work.tokens for model, work in self.workers.load().items()}
        paces = self.workers.paces(tokens)
        rates = {model: p.tokens_per_second for model, p in paces.items() if p.tokens_per_second}
        return desired_workers(tokens, rates, warm, self.least, self.most)

    def add(self, now: float) -> None:
        taken = {child.slot for child in self.children.values()}
        slot = next(number for number in range(self.most) if number not in taken)
        process = self.start(slot)
        self.children[process.pid] = Child(process, now, now, slot)
        LOG.info("worker %s started", process.pid)

    def reap(self, now: float) -> None:
        for pid, child in list(self.children.items()):
            end = child.process.poll()
            if end is None:
                continue
            del self.children[pid]
            if child.stopping or end == 0:
                LOG.info("worker %s has gone", pid)
                continue
            self.crashes = 1 if now - child.began > STEADY_SECONDS else self.crashes + 1
            pause = min(LONGEST_PAUSE, 2.0 ** (self.crashes - 1))
            self.not_before = now + pause
            LOG.warning("worker %s ended with %s; the next one starts in %.0f s at the earliest", pid, end, pause)

    def end_hung(self, beats: Sequence[Beat], now: float) -> None:
        """Kill workers without a heartbeat; their parts return when the leases end.

        While the store is away no heartbeat can arrive, so that time does not count.
        """
        heard = {beat.pid for beat in beats if self.child(beat)}
        away, self.looked = now - self.looked > SILENT_SECONDS, now
        for pid, child in self.children.items():
            if pid in heard or away:
                child.heard = now
            elif now - child.heard > HUNG_SECONDS:
                LOG.warning("worker %s is not heard of for %.0f s and is ended", pid, HUNG_SECONDS)
                child.process.kill()

    def stop_idle(self, beats: Sequence[Beat], count: int) -> None:
        """Stop up to `count` of this fleet's workers that were idle for `idle_seconds`, the youngest first."""
        before = self.workers.store.now() - self.idle_seconds
        idle = [beat for beat in beats if not beat.in_flight and beat.busy_at < before]
        for beat in idle[::-1][:count]:
            child = self.child(beat)
            if child is not None and not child.stopping:
                child.stopping = True
                child.process.terminate()

    def close(self) -> None:
        """Let all workers drain, and kill those that take longer than `DRAIN_SECONDS`."""
        for child in self.children.values():
            child.process.terminate()
        until = time.monotonic() + DRAIN_SECONDS
        for child in self.children.values():
            try:
                child.process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.process.kill()
                child.process.wait()
        self.children.clear()


def worker_starter(settings: Settings, broker: str, idle_seconds: float, devices: Sequence[str] = ()) -> Starter:
    """Starts `complete-fn worker` with our settings. Settings that may hold a password are passed by the environment.

    Args:
        devices: CUDA_VISIBLE_DEVICES by slot; empty without accelerators.
    """
    own = {"COMPLETE_FN_BROKER": broker, "COMPLETE_FN_HOME": str(settings.home)}
    if settings.models_file is not None:
        own["COMPLETE_FN_MODELS"] = str(settings.models_file)
    command = [sys.executable, "-P", "-m", "complete_fn", "worker", "--idle-seconds", str(idle_seconds)]

    def start(slot: int) -> Process:
        return subprocess.Popen(
            [*command, "--drain-seconds", str(DRAIN_SECONDS * 2 / 3), "--parent", str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env=child_environment(own | ({"CUDA_VISIBLE_DEVICES": devices[slot]} if devices else {})),
            start_new_session=True,
        )

    return start
