"""Canaries: what a worker's messages read and set of Celery's insides is still there, and still does what it did."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import celery
import pytest
import redis
from celery.exceptions import WorkerShutdown
from celery.worker import state

from complete_fn.jobs.queue import Bell, CeleryQueue
from complete_fn_workers import celery_internals
from complete_fn_workers.celery_messages import Messages
from deploy.servers import Redis, running
from tests.canaries import Need, complaint, needs_in

pytestmark = pytest.mark.canary

NEEDS = needs_in(celery_internals.__doc__ or "")


@pytest.mark.parametrize("need", NEEDS, ids=str)
def test_celery_still_has(need: Need) -> None:
    missing = complaint("Celery", celery.__version__, need)
    assert not missing, missing


@pytest.fixture
def running_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers of later tests are not ended by this one."""
    monkeypatch.setattr(state, "should_stop", None)


def test_a_worker_that_looks_at_the_flag_ends_with_exit_code_0(running_again: None) -> None:
    state.maybe_shutdown()
    celery_internals.stop_workers()
    with pytest.raises(WorkerShutdown) as ended:
        state.maybe_shutdown()
    assert ended.value.code == 0


def test_a_worker_knows_the_words_for_being_alone() -> None:
    """It takes any keyword; what it does not know has no effect."""
    app = CeleryQueue("redis://127.0.0.1:9/0").app
    social = {"Gossip", "Mingle", "Heart"}
    assert {step.alias for step in app.WorkController(pool="threads").consumer.steps} >= social
    worker = celery_internals.make_worker(app, 3)
    assert not social & {step.alias for step in worker.consumer.steps}
    assert worker.pool_cls.__module__ == "celery.concurrency.thread"
    assert worker.concurrency == 3


@pytest.fixture
def broker() -> Iterator[Redis]:
    with running(Redis) as server:
        yield server


def until(seen: Callable[[], object], seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while not seen() and time.monotonic() < end:
        time.sleep(0.05)
    return bool(seen())


def assert_ends(messages: Messages) -> None:
    """Before Celery 5.7 a worker looks at the flag only every ten seconds, and `close` goes on without it."""
    messages.close()
    messages.thread.join(20)
    assert not messages.thread.is_alive(), "Celery's worker does not look at celery.worker.state.should_stop any more."


def test_a_message_rings_its_own_worker_which_ends(broker: Redis, running_again: None) -> None:
    Messages(broker.url, ["a"], Bell(), 1)  # the process has had another before
    queue = CeleryQueue(broker.url)
    messages = Messages(broker.url, ["a"], queue.bell, 1)
    messages.start()
    queue.announce({"a": 1})
    try:
        assert until(lambda: queue.bell.rings)
        queue.bell.look()
        assert_ends(messages)
    finally:
        queue.bell.close()


def test_a_worker_whose_broker_is_away_ends_too(broker: Redis, running_again: None) -> None:
    messages = Messages(broker.url, ["a"], Bell(), 1)
    messages.start()
    with redis.Redis.from_url(broker.url) as client:
        assert until(lambda: len(client.client_list()) > 1)
    broker.stop()
    time.sleep(3)  # by now it looks for the broker
    assert_ends(messages)
