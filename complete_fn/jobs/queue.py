"""A queue tells workers that there is work. A message says only that; the worker claims a part from the store."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from typing import Any, Protocol
from urllib.parse import urlsplit

from complete_fn.errors import InvalidOptionError
from complete_fn.logs import logger
from complete_fn.ports import PORTS, has_port
from complete_fn.registry import resolve

LOG = logger("queue")
TASK = "complete_fn.work"
MOST_MESSAGES = 16  # messages for a model at a time: a worker that has begun looks for more work by itself
# After so many seconds Redis sends a killed worker's message again. Its parts come back sooner, when their leases end.
VISIBILITY_SECONDS = 3600
ANSWER_SECONDS = 2.0  # time limit on a broker's reply, so that no caller waits for a broker that hangs
WRONG_BROKER = "The broker {url!r} (--broker or COMPLETE_FN_BROKER) is not a URL like redis://127.0.0.1:6379/0."
WRONG_PORT = f"The broker {{url!r}} (--broker or COMPLETE_FN_BROKER) cannot be reached: {PORTS}."
CELERY = {
    "accept_content": ["json"],
    "task_serializer": "json",
    "task_ignore_result": True,
    "task_acks_late": True,
    "task_reject_on_worker_lost": True,
    "worker_prefetch_multiplier": 1,
    "worker_enable_remote_control": False,
    "worker_send_task_events": False,
    "worker_hijack_root_logger": False,
    "broker_connection_retry_on_startup": True,
    "broker_connection_max_retries": None,
}


class Bell:
    """Idle worker threads wait for the bell. It counts rings: a thread misses none between its look and its wait."""

    def __init__(self) -> None:
        self.change = threading.Condition()
        self.rings = self.looks = 0
        self.closed = False

    def look(self) -> int:
        """Note that a thread is about to look into the store; returns the number of rings, for `wait`."""
        with self.change:
            self.looks += 1
            self.change.notify_all()
            return self.rings

    def wait(self, heard: int, seconds: float) -> None:
        """Wait until the bell rings after the ring number `heard`, at most so many seconds."""
        with self.change:
            self.change.wait_for(lambda: self.closed or self.rings != heard, seconds)

    def ring(self, until_looked: bool = False) -> None:
        """Say that there is work. With `until_looked`, return once a thread has looked into the store after that."""
        with self.change:
            self.rings += 1
            self.change.notify_all()
            if until_looked:
                before = self.looks
                self.change.wait_for(lambda: self.closed or self.looks != before)

    def close(self) -> None:
        """Wake all threads that wait; later waits return at once."""
        with self.change:
            self.closed = True
            self.change.notify_all()


class JobQueue(Protocol):
    """Announces work. A lost or repeated message does no harm, as workers look into the store now and then anyway."""

    bell: Bell

    def announce(self, parts: Mapping[str, int]) -> None:
        """Say how many parts wait for each model. Never raises, and takes 2 s at most."""
        ...


class InlineQueue:
    """The queue of workers that are threads of the same process."""

    def __init__(self) -> None:
        self.bell = Bell()

    def announce(self, parts: Mapping[str, int]) -> None:
        if any(parts.values()):
            self.bell.ring()


class CeleryQueue:
    """Messages to worker processes through Redis: a Celery queue for each model, sent by the task's name.

    The bell rings only in a worker's process, for the messages that arrive there.

    Raises:
        InvalidOptionError: The broker's URL is no URL of Redis.
        EngineMissingError: Celery is not installed; the message has the command that brings it.
    """

    def __init__(self, broker: str) -> None:
        self.bell = Bell()
        self.app = celery_app(broker)
        self.app.conf.broker_transport_options["socket_timeout"] = ANSWER_SECONDS
        self.lock = threading.Lock()
        self.mute = False

    def announce(self, parts: Mapping[str, int]) -> None:
        """Send messages until each model has one for every part that waits, but at most `MOST_MESSAGES`."""
        wanted = {model: min(count, MOST_MESSAGES) for model, count in parts.items() if count}
        if not wanted:
            return
        try:
            with self.lock, self.app.producer_pool.acquire(block=True, timeout=ANSWER_SECONDS) as producer:
                for model, count in wanted.items():
                    self.top_up(producer, model, count)
            self.mute = False
        except Exception as error:  # no failure of a broker matters: the work is in the store and is announced again
            if not self.mute:
                LOG.warning("The broker takes no messages (%s); work is announced again later.", type(error).__name__)
            self.mute = True

    def top_up(self, producer: Any, model: str, count: int) -> None:
        name = queue_name(model)
        try:
            there = producer.channel.queue_declare(name).message_count
        except producer.connection.connection_errors:  # the broker was restarted since the last message: try again
            producer.revive(producer.connection.default_channel)
            there = producer.channel.queue_declare(name).message_count
        for _ in range(count - there):
            self.app.send_task(TASK, kwargs={"model": model}, queue=name, producer=producer, retry=False)


def queue_name(model: str) -> str:
    return f"complete_fn.{model}"


def celery_app(broker: str, models: Iterable[str] = ()) -> Any:
    """The Celery application of a sender or a worker. A worker's listens to the queues of its `models`."""
    if urlsplit(broker).scheme not in ("redis", "rediss", "redis+socket", "unix"):
        raise InvalidOptionError(WRONG_BROKER.format(url=without_password(broker)))
    if not has_port(broker):
        raise InvalidOptionError(WRONG_PORT.format(url=without_password(broker)))
    resolve("redis:Redis")
    app = resolve("celery:Celery")("complete_fn", broker=broker, set_as_current=False)
    options = {
        "visibility_timeout": VISIBILITY_SECONDS,
        "socket_connect_timeout": ANSWER_SECONDS,
        "health_check_interval": 10,
    }
    app.conf.update(CELERY, broker_transport_options=options, task_default_queue=queue_name(""))
    app.conf.task_queues = [resolve("kombu:Queue")(queue_name(m), routing_key=queue_name(m)) for m in models] or None
    return app


def without_password(url: str) -> str:
    """The URL with its user and password hidden, for messages."""
    head, at, host = url.rpartition("@")
    return f"{head.partition('//')[0]}//***{at}{host}" if at else url
