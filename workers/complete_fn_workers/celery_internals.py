"""Celery's insides: this module alone reads and sets what Celery does not offer to others.

The canaries (`tests/integration/workers/test_canaries_celery.py`) read the table below and look up each name in the
Celery that is installed. An entry is: where in Celery, and the names there (of a function: its parameters); then which
file needs them for what, and why no public way does. All of them were seen in Celery 5.7.0.

celery.worker.state  maybe_shutdown should_stop
    celery_messages.py, to end a worker that runs in a thread. `WorkController.stop()` is public, but it waits without
    bound for a task that waits for a hand, and leaves a worker that looks for a broker that is away looking; Celery's
    own helper for tests sets this module's flags too.
celery.worker.consumer.gossip:Gossip.__init__  without_gossip
celery.worker.consumer.mingle:Mingle.__init__  without_mingle
celery.worker.consumer.heart:Heart.__init__  without_heartbeat
    celery_messages.py, to exchange nothing with other workers. `WorkController` takes any keyword and ignores what it
    does not know; only its command line documents these.
"""

from __future__ import annotations

import logging
from typing import Any

from celery.worker import state

ALONE = {"without_gossip": True, "without_mingle": True, "without_heartbeat": True}


def make_worker(app: Any, threads: int) -> Any:
    """Celery's worker without its signal handlers, which takes tasks in so many threads and knows no other worker."""
    return app.WorkController(pool="threads", concurrency=threads, loglevel=logging.ERROR, logfile=None, **ALONE)


def stop_workers() -> None:
    """End all workers of this process, also those that start later, with exit code 0."""
    state.should_stop = 0  # type: ignore[assignment]  # the stubs know None only
