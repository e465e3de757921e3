"""Models that share a place: never more engines than there is room for, nobody starves, nobody swaps with every run."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from complete_fn.engines import slots
from complete_fn.engines.slots import EngineRoom
from complete_fn.engines.stoppable import Stopped

NEVER = threading.Event()


class Building:
    """Counts engines, as `EngineRoom` lets them."""

    def __init__(self, most: int | None) -> None:
        self.lock = threading.Lock()
        self.up: set[str] = set()
        self.busy: dict[str, int] = {}
        self.most_up = self.starts = 0
        self.room = EngineRoom(most, self.unload, lambda model: 0.0)

    def unload(self, model: str) -> None:
        time.sleep(0.002)
        with self.lock:
            assert not self.busy.get(model)
            self.up.discard(model)

    def run(self, model: str, seconds: float = 0.0, bounded: bool = True, stop: threading.Event = NEVER) -> None:
        with self.room.place(model, stop, bounded):
            with self.lock:
                if bounded and model not in self.up:
                    self.up.add(model)
                    self.starts += 1
                self.most_up = max(self.most_up, len(self.up))
                self.busy[model] = self.busy.get(model, 0) + 1
            time.sleep(seconds)
            with self.lock:
                self.busy[model] -= 1


@pytest.fixture
def turn(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    monkeypatch.setattr(slots, "LOOK_SECONDS", 0.005)
    monkeypatch.setattr(slots, "GRACE_SECONDS", 0.05)
    return lambda seconds: monkeypatch.setattr(slots, "TURN_SECONDS", seconds)


@pytest.mark.parametrize("most", [1, 2])
def test_a_crowd_of_models_gets_through_with_never_more_engines_than_fit(
    most: int, turn: Callable[[float], None]
) -> None:
    turn(0.02)
    building = Building(most)
    with ThreadPoolExecutor(12) as pool:
        list(pool.map(lambda n: building.run("abcd"[n % 4], 0.003), range(120)))
    assert building.most_up == most
    assert building.starts >= 4
    assert not building.room.waiting


def test_a_model_with_work_keeps_its_place_for_its_turn_and_not_for_ever(turn: Callable[[float], None]) -> None:
    turn(0.4)
    building = Building(1)
    end = threading.Event()

    def keep_busy() -> None:
        while not end.is_set():
            building.run("a", 0.01)

    with ThreadPoolExecutor(5) as pool:
        for _ in range(3):
            pool.submit(keep_busy)
        time.sleep(0.05)
        began = time.monotonic()
        pool.submit(building.run, "b").result(timeout=10)
        waited = time.monotonic() - began
        end.set()
    assert 0.2 < waited < 5
    assert building.starts <= 3  # a, b, a


def test_without_work_a_place_is_given_up_soon(turn: Callable[[float], None]) -> None:
    turn(3600.0)
    building = Building(1)
    building.run("a")
    building.run("b")
    assert building.up == {"b"}
    building.run("b")
    assert building.starts == 2


def test_who_is_stopped_waits_no_longer(turn: Callable[[float], None]) -> None:
    turn(3600.0)
    building, stop, begun = Building(1), threading.Event(), threading.Event()

    def hold() -> None:
        with building.room.place("a", NEVER):
            begun.set()
            stop.wait(10)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(hold)
        assert begun.wait(10)
        threading.Timer(0.1, stop.set).start()
        with pytest.raises(Stopped):
            building.run("b", stop=stop)
    assert not building.room.waiting
    building.run("b")


def test_engines_elsewhere_and_no_bound_need_no_place(turn: Callable[[float], None]) -> None:
    building = Building(1)
    with building.room.place("a", NEVER):
        building.run("elsewhere", bounded=False)
    unbounded = Building(None)
    with unbounded.room.place("a", NEVER), unbounded.room.place("b", NEVER):
        assert unbounded.room.next_models(lambda: True) == [None]
    building.room.vacate_idle(3600.0)
    assert set(building.room.seats) == {"a", "elsewhere"}
    building.room.vacate_idle(0.0)
    assert not building.room.seats


def test_whose_parts_are_claimed(turn: Callable[[float], None]) -> None:
    turn(3600.0)
    building = Building(1)
    room = building.room
    assert room.next_models(lambda: True) == [None]
    with room.place("a", NEVER):
        assert room.next_models(lambda: True) == ["a", None]
        turn(-1.0)
        assert room.next_models(lambda: True) == [None]  # some model has no worker
        assert room.next_models(lambda: False) == ["a", None]
        room.waiting["b"] = [0.0]
        assert room.next_models(lambda: True) == ["b"]
        turn(3600.0)
        assert room.next_models(lambda: True) == ["a"]
