"""How many workers there should be, and who starts and stops them."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from complete_fn.errors import InvalidOptionError
from complete_fn.jobs.worker_store import Beat, ModelState, WorkerStore, own_id
from complete_fn.settings import Settings
from complete_fn.store.store import Store
from complete_fn.worker.devices import device_shares, visible_devices, within_devices
from complete_fn.worker.fleet import Fleet, worker_starter
from complete_fn.worker.scaling import desired_workers, parse_workers
from tests.clocks import pass_time

models = st.sampled_from(["a", "b", "c"])
queues = st.dictionaries(models, st.integers(0, 10**9))
rates = st.dictionaries(models, st.floats(0.0, 1e6))
bounds = st.tuples(st.integers(0, 8), st.integers(0, 8)).map(sorted)


@given(queues, rates, st.integers(0, 9), bounds)
def test_the_number_of_workers_keeps_its_bounds_and_follows_the_work(
    queued: dict[str, int], rates: dict[str, float], warm: int, bounds: list[int]
) -> None:
    least, most = bounds
    found = desired_workers(queued, rates, warm, least, most)
    assert least <= found <= most
    assert found == least if not queued else found >= min(1, most)
    more = {**queued, "a": queued.get("a", 0) + 10_000_000}
    assert desired_workers(more, rates, warm, least, most) >= found
    faster = {model: (rates.get(model) or 1_000.0) * 10 for model in queued}
    assert desired_workers(queued, faster, warm, least, most) <= found
    assert desired_workers(queued, rates, warm + 1, least, most) >= found


def test_a_worker_more_is_started_for_a_minute_of_work_and_kept_for_less() -> None:
    rates = {"m": 100.0}
    assert [desired_workers({"m": 100 * s}, rates, 0, 0, 4) for s in (0, 1, 60, 61, 200, 9_000)] == [1, 1, 1, 2, 4, 4]
    assert [desired_workers({"m": 100 * s}, rates, 3, 0, 4) for s in (0, 5, 15, 60)] == [1, 1, 2, 3]
    assert desired_workers({}, rates, 3, 0, 4) == 0
    assert desired_workers({}, rates, 0, 2, 4) == 2


def test_a_range_of_workers_is_read_or_refused() -> None:
    assert parse_workers("0..4") == (0, 4)
    assert parse_workers("2") == (2, 2)
    assert parse_workers("0") == (0, 0)
    for wrong in ("", "x", "4..1", "-1..2", "-1", "1...3", "1..2..3"):
        with pytest.raises(InvalidOptionError, match=r"is not a range such as 0\.\.2"):
            parse_workers(wrong)


@dataclass
class Process:
    """A process that does nothing until the test says so."""

    pid: int
    end: int | None = None
    told: str = ""

    def poll(self) -> int | None:
        return self.end

    def terminate(self) -> None:
        self.told = "terminate"

    def kill(self) -> None:
        self.told = "kill"

    def wait(self, timeout: float | None = None) -> int:
        self.end = self.end or 0
        return self.end


class Crew:
    """A fleet over a real store, whose processes are the test's."""

    def __init__(self, home: Path, least: int, most: int, idle_seconds: float = 60.0) -> None:
        self.workers = WorkerStore(Store(home / "state.sqlite3"))
        self.processes: list[Process] = []
        self.slots: list[int] = []
        self.fleet = Fleet(self.workers, self.start, least, most, idle_seconds)

    def start(self, slot: int) -> Process:
        self.slots.append(slot)
        self.processes.append(Process(1_000_000 + len(self.processes)))
        return self.processes[-1]

    def beat(self, process: Process, idle: float = 0.0, **more: object) -> None:
        now = time.time()
        host, _, started = own_id().split("|")
        # The id has a pid that lives, so that nobody takes it for gone.
        beat = Beat(f"elsewhere-{process.pid}|1|{started}", host, process.pid, now, now, now - idle)
        self.workers.beat(replace(beat, **more))  # type: ignore[arg-type]


@pytest.fixture
def crew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Crew:
    monkeypatch.setattr("complete_fn.jobs.worker_store.process_gone", lambda beat: False)
    return Crew(tmp_path, 0, 2)


def test_a_worker_comes_when_asked_for_and_goes_when_idle(crew: Crew) -> None:
    crew.fleet.adjust()
    assert crew.processes == []
    crew.fleet.want("m")
    crew.fleet.adjust()
    crew.fleet.adjust()
    (worker,) = crew.processes
    crew.beat(worker, idle=59)
    crew.fleet.wanted.clear()
    crew.fleet.adjust()
    assert worker.told == ""
    crew.beat(worker, idle=61, in_flight=1)
    crew.fleet.adjust()
    assert worker.told == ""
    crew.beat(worker, idle=61)
    crew.fleet.adjust()
    assert worker.told == "terminate"
    worker.end = 0
    crew.fleet.adjust()
    assert crew.fleet.children == {}


def test_workers_of_others_count(crew: Crew) -> None:
    crew.beat(Process(77), host="another-machine")
    crew.fleet.want("m")
    crew.fleet.adjust()
    assert crew.processes == []


def test_one_that_crashes_is_started_again_after_longer_and_longer(crew: Crew) -> None:
    crew.fleet.want("m")
    pauses = []
    for _ in range(3):
        crew.fleet.not_before = 0.0
        crew.fleet.adjust()
        crew.processes[-1].end = 1
        crew.fleet.adjust()
        pauses.append(round(crew.fleet.not_before - time.monotonic()))
        assert crew.fleet.children == {}
    assert pauses == [1, 2, 4]
    assert len(crew.processes) == 3


def test_one_that_hangs_is_killed_but_not_for_the_silence_of_the_store(crew: Crew) -> None:
    crew.fleet.want("m")
    crew.fleet.adjust()
    (worker,) = crew.processes
    crew.fleet.children[worker.pid].heard -= 100
    crew.fleet.looked -= 100  # the store was away
    crew.fleet.adjust()
    assert worker.told == ""
    crew.fleet.children[worker.pid].heard -= 100
    crew.fleet.adjust()
    assert worker.told == "kill"


def test_a_worker_takes_the_place_of_the_one_that_went(tmp_path: Path) -> None:
    crew = Crew(tmp_path, 2, 2)
    crew.fleet.adjust()
    crew.processes[0].end = 0
    crew.fleet.adjust()
    assert crew.slots == [0, 1, 0]


@pytest.mark.parametrize(
    ("nodes", "named", "found"),
    [
        (0, "0,1", []),
        (3, None, ["0", "1", "2"]),
        (3, "2, GPU-a", ["2", "GPU-a"]),
        (3, "1,-1,2", ["1"]),
        (3, "", []),
    ],
)
def test_accelerators_are_those_that_the_environment_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nodes: int, named: str | None, found: list[str]
) -> None:
    for name in ("nvidiactl", "nvidia-uvm", *(f"nvidia{number}" for number in range(nodes))):
        (tmp_path / name).touch()
    monkeypatch.setattr("complete_fn.worker.devices.NODES", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if named is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert visible_devices() == found


def test_each_worker_has_accelerators_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert within_devices(0, 4, []) == (0, 4)
    assert within_devices(1, 2, ["0", "1"]) == (1, 2)
    assert caplog.text == ""
    assert within_devices(3, 4, ["5", "7"]) == (2, 2)
    assert "up to 4 processes and there are 2 accelerators (5, 7): at most 2 are started" in caplog.text
    assert device_shares([], 4) == []
    assert device_shares(["0", "1", "2", "3", "4"], 2) == ["0,1", "2,3"]
    seen: list[str | None] = []
    monkeypatch.setattr("subprocess.Popen", lambda *_, env, **__: seen.append(env.get("CUDA_VISIBLE_DEVICES")))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    settings = Settings(tmp_path, None, None)
    for shares in (["5", "7"], []):
        start = worker_starter(settings, "redis://127.0.0.1", 1.0, shares)
        start(1)
        start(0)
    assert seen == ["7", "5", None, None]


def test_the_heartbeat_comes_back_as_it_was_told(tmp_path: Path) -> None:
    store = WorkerStore(Store(tmp_path / "state.sqlite3"))
    now = time.time()
    host, pid, _ = own_id().split("|")
    state = {"m": ModelState(True, 120.5, 8.0, 4711)}
    beat = Beat(own_id(), host, int(pid), now, now, now, "http://127.0.0.1:1", False, 2, state)
    store.beat(replace(beat, in_flight=1))
    store.beat(beat)
    assert store.alive() == [beat]
    assert beat.warm("m")
    assert not beat.warm("other")
    pass_time(store.store, 60)
    assert store.alive() == []
    assert store.forget_gone() == []
    gone = replace(beat, id=f"{host}|{pid}|1.0")  # an earlier process of this number
    store.beat(gone)
    assert store.forget_gone() == [gone.id]
    store.leave(beat.id)
    assert store.alive() == []
