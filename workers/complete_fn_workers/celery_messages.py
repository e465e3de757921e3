"""The Celery side of a worker: each message says that there is work, and wakes a claiming thread (a *hand*)."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable
from typing import Any

from complete_fn.jobs.queue import TASK, Bell, celery_app
from complete_fn.logs import logger
from complete_fn_workers.celery_internals import make_worker, stop_workers

LOG = logger("worker")
AGAIN_SECONDS = 5.0
STOP_SECONDS = 5.0


class Messages:
    """Takes messages of the models' queues on threads of its own, for as long as the process lives.

    A message is acknowledged after a hand has looked into the store. So a worker whose hands are all busy holds as many
    messages as it has hands, and leaves the next ones to other workers.

    Raises:
        InvalidOptionError: the broker's URL is not Redis'.
    """

    def __init__(self, broker: str, models: Iterable[str], bell: Bell, hands: int) -> None:
        self.hands = hands
        self.app = celery_app(broker, models)
        self.closing = threading.Event()
        self.thread = threading.Thread(target=self.consume, name="messages", daemon=True)

        def work(**_: Any) -> None:
            bell.ring(until_looked=True)

        # The pool's threads run the default application's tasks. Of a task that all applications share, Celery keeps
        # the first function that this process registered.
        self.app.set_default()
        self.app.task(name=TASK, typing=False, shared=False)(work)

    def start(self) -> None:
        logging.getLogger("celery").setLevel(logging.ERROR)  # it repeats every try to reach a broker that is away
        logging.getLogger("kombu").setLevel(logging.ERROR)
        self.thread.start()

    def consume(self) -> None:
        """Run Celery's worker without its signal handlers, as `worker` has its own. Start it again after a failure."""
        while not self.closing.is_set():
            make_worker(self.app, self.hands).start()
            if not self.closing.wait(AGAIN_SECONDS):
                LOG.warning("Messages are taken again after a failure.")

    def close(self) -> None:
        """Stop. Messages that were not acknowledged go back to their queue."""
        self.closing.set()
        stop_workers()
        self.thread.join(STOP_SECONDS)
