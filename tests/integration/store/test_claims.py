"""A prompt that several runs ask for at the same time is computed and billed once, whoever dies meanwhile."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from complete_fn.engines.base import EchoEngine
from complete_fn.engines.call import Call
from complete_fn.engines.catalogue import Model
from complete_fn.engines.stoppable import StoppableEngine, Stopped
from complete_fn.errors import StoreError
from complete_fn.execution.admission import Tools
from complete_fn.execution.runner import run
from complete_fn.store.store import Store
from complete_fn.store.tables import attempts, claims, ledger
from complete_fn.text import text_column
from complete_fn.types import Asker, Completion, CompletionRequest, RowError, SamplingParams

CALL = Call(Model("m", "m", engine="echo"), SamplingParams(max_tokens=20))
ROWS = 600
ROOT = Path(__file__).parents[3]


class Slow(EchoEngine):
    """20 ms a row, some rows at a time; `text` of the row at which it stops answering for good."""

    def __init__(self, stuck: str = "") -> None:
        super().__init__()
        self.stuck = stuck
        self.asked: list[str] = []

    def complete(self, request: CompletionRequest) -> Completion:
        self.asked.append(str(request.prompt))
        time.sleep(0.02 if request.prompt != self.stuck else 1000)
        return super().complete(request)


def prompts(first: int, last: int) -> Any:
    return text_column([f"w{n}" for n in range(first, last)])


WORKER = """
import sys
from tests.integration.store.test_claims import *
store, engine = Store(sys.argv[1]), Slow(sys.argv[4])
print("began", flush=True)
sys.stdin.readline()
found = run(CALL, prompts(int(sys.argv[2]), int(sys.argv[3])), Tools(engine, store), Asker())
assert found.text.to_pylist() == prompts(int(sys.argv[2]), int(sys.argv[3])).to_pylist()
print(len(engine.asked), flush=True)
"""


def start(url: str, first: int, last: int, stuck: str = "") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WORKER, url, str(first), str(last), stuck]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    worker = subprocess.Popen(command, cwd=ROOT, text=True, **pipes)  # type: ignore[call-overload]
    assert worker.stdout.readline() == "began\n"
    return worker  # type: ignore[no-any-return]


def go(worker: subprocess.Popen[str]) -> None:
    assert worker.stdin is not None
    worker.stdin.write("\n")
    worker.stdin.flush()


def billed_rows(store: Store) -> int:
    with store.read() as connection:
        return int(
            connection.execute(sa.select(sa.func.sum(ledger.c.rows)).where(ledger.c.price_class == "input")).scalar()
            or 0
        )


def claimed_by_others(store: Store) -> int:
    with store.read() as connection:
        return int(connection.execute(sa.select(sa.func.count()).select_from(claims)).scalar_one())


def test_processes_that_ask_the_same_compute_it_once(store_url: str) -> None:
    """Three processes on overlapping thirds of a table: each row is computed by one of them."""
    store = Store(store_url)
    workers = [start(store_url, first, first + ROWS) for first in (0, ROWS // 3, 0)]
    for worker in workers:
        go(worker)
    counts = [int(worker.communicate(timeout=120)[0]) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0, 0]
    assert sum(counts) == ROWS + ROWS // 3 == billed_rows(store)
    assert claimed_by_others(store) == 0
    store.close()


def test_what_a_killed_run_had_claimed_is_computed_by_the_one_that_waits(store_url: str) -> None:
    store = Store(store_url)
    stuck = start(store_url, 0, 50, "w25")
    go(stuck)
    until = time.monotonic() + 60
    while not claimed_by_others(store) and time.monotonic() < until:
        time.sleep(0.02)
    engine = Slow()
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(run, CALL, prompts(0, 60), Tools(engine, store), Asker())
        while len(engine.asked) < 10 and time.monotonic() < until:
            time.sleep(0.02)  # what nobody else has is computed meanwhile
        assert sorted(set(engine.asked)) == [f"w{n}" for n in range(50, 60)]
        stuck.kill()
        stuck.communicate()
        assert waiting.result(timeout=60).text.to_pylist() == prompts(0, 60).to_pylist()
    assert "w25" in engine.asked
    assert len(engine.asked) == len(set(engine.asked))
    assert billed_rows(store) == 60
    assert claimed_by_others(store) == 0
    store.close()


def test_a_run_that_waits_for_another_can_be_stopped(store_url: str) -> None:
    store, release = Store(store_url), threading.Event()

    class Held(EchoEngine):
        def complete(self, request: CompletionRequest) -> Completion:
            assert release.wait(60)
            return super().complete(request)

    stop = threading.Event()
    with ThreadPoolExecutor() as pool:
        first = pool.submit(run, CALL, prompts(0, 5), Tools(Held(), store), Asker())
        while claimed_by_others(store) < 5:
            time.sleep(0.02)
        tools = Tools(EchoEngine(), store, pause=StoppableEngine(EchoEngine(), stop).pause)
        second = pool.submit(run, CALL, prompts(0, 5), tools, Asker())
        time.sleep(0.5)
        assert not second.done()
        stop.set()
        with pytest.raises(Stopped):
            second.result(timeout=5)
        release.set()
        first.result(timeout=60)
    assert billed_rows(store) == 5
    store.close()


def test_a_row_that_failed_elsewhere_is_tried_again(store_url: str) -> None:
    """Row errors are never shared, so the run that waited for the row asks for itself."""
    store, release = Store(store_url), threading.Event()

    class Failing(EchoEngine):
        def complete(self, request: CompletionRequest) -> Completion:
            assert release.wait(60)
            return Completion(text=None, error=RowError("timeout", "too slow"))

    engine = Slow()
    with ThreadPoolExecutor() as pool:
        first = pool.submit(run, CALL, prompts(0, 3), Tools(Failing(), store), Asker())
        while claimed_by_others(store) < 3:
            time.sleep(0.02)
        second = pool.submit(run, CALL, prompts(0, 3), Tools(engine, store), Asker())
        time.sleep(0.3)
        assert not engine.asked
        release.set()
        assert first.result(timeout=60).text.null_count == 3
        assert second.result(timeout=60).text.null_count == 0
    assert len(engine.asked) == 3
    store.close()


def test_tenants_and_refreshes_wait_for_nobody(store_url: str) -> None:
    store, release = Store(store_url), threading.Event()

    class Held(EchoEngine):
        def complete(self, request: CompletionRequest) -> Completion:
            assert release.wait(60)
            return super().complete(request)

    with ThreadPoolExecutor() as pool:
        first = pool.submit(run, CALL, prompts(0, 5), Tools(Held(), store), Asker())
        while claimed_by_others(store) < 5:
            time.sleep(0.02)
        for who, cache in ((Asker("another"), "on"), (Asker(), "refresh"), (Asker(), "off")):
            engine = Slow()
            run(CALL, prompts(0, 5), Tools(engine, store), who, cache)  # type: ignore[arg-type]
            assert len(engine.asked) == 5
        release.set()
        first.result(timeout=60)
    store.close()


def test_a_silent_run_loses_its_claims(store_url: str) -> None:
    store = Store(store_url)
    attempt = store.begin(Asker(), "m", "USD", "x")
    assert store.claim(attempt, [b"a", b"b"]) == {b"a", b"b"} == store.claim(attempt, [b"a", b"b"])
    another = store.begin(Asker(), "m", "USD", "x")
    assert store.claim(another, [b"b", b"c"]) == {b"c"}
    store.drop_claims()
    assert store.claimed("local", [b"a", b"b", b"c", b"d"]) == {b"a", b"b", b"c"}
    with store.write() as connection:
        silent = attempts.update().where(attempts.c.id == attempt.id)
        connection.execute(silent.values(seen_at=time.time() - 1000))
    store.drop_claims()
    assert store.claimed("local", [b"a", b"b", b"c"]) == {b"c"}
    with pytest.raises(StoreError, match="given up as lost"):  # it goes on, but others have what it held
        store.touch(attempt)
    store.finish(another, "done")
    assert store.claimed("local", [b"a", b"b", b"c"]) == set()
    store.finish(attempt, "failed")
    store.close()
