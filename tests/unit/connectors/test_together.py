"""Runs of one query: those of a model at the same time, the longest answers first, models in turn."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from complete_fn import EchoEngine, Session
from complete_fn.errors import EngineError
from complete_fn.interrupts import INTERRUPTS
from complete_fn.types import Completion, CompletionRequest
from complete_fn_connectors.concurrent_runs import WantedRun, complete_together

LONG, SHORT, ONE = {"max_tokens": 50}, {"max_tokens": 2}, {"choices": ["a", "b"]}


def wanted(options: dict[str, Any], *prompts: str, model: str = "echo") -> WantedRun:
    return WantedRun(model, pa.array(prompts, pa.large_string()), options)


@pytest.fixture
def session_on(tmp_path: Path) -> Callable[[Any], Session]:
    return lambda engine: Session(engine=engine, home=tmp_path / "home", progress=False)


class Meeting(EchoEngine):
    """Answers only while two streams are open."""

    def __init__(self) -> None:
        super().__init__()
        self.meeting = threading.Barrier(2)

    def stream(self, requests: Iterable[CompletionRequest], tenant: str) -> Iterator[tuple[int, Completion]]:
        self.meeting.wait(60)
        yield from super().stream(requests, tenant)


def test_runs_of_a_model_go_together_and_come_back_in_order(session_on: Callable[[Any], Session]) -> None:
    short, long = complete_together(session_on(Meeting()), [wanted(SHORT, "a b c", "d"), wanted(LONG, "a b c")])
    assert short.text.to_pylist() == ["a b", "d"]
    assert long.text.to_pylist() == ["a b c"]


def test_the_longest_answers_go_first_and_models_take_turns(
    session_on: Callable[[Any], Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("complete_fn_connectors.concurrent_runs.AT_ONCE", 1)
    engine = EchoEngine()
    asked = [wanted(ONE, "one"), wanted(LONG, "two", model="other"), wanted(SHORT, "three"), wanted(LONG, "four")]
    assert [a.text.to_pylist() for a in complete_together(session_on(engine), asked)] == [
        ["a"],
        ["two"],
        ["three"],
        ["four"],
    ]
    assert [(r.model, r.prompt) for r in engine.requests] == [
        ("echo", "four"),
        ("echo", "three"),
        ("echo", "one"),
        ("other", "two"),
    ]


def test_a_failure_of_one_run_stops_those_beside_it(session_on: Callable[[Any], Session]) -> None:
    class Broken(EchoEngine):
        def complete(self, request: CompletionRequest) -> Completion:
            if request.sampling.max_tokens == 2:
                raise EngineError("it broke")
            return super().complete(request)

    engine = Broken(row_seconds=0.05)
    with pytest.raises(EngineError, match="it broke"):
        complete_together(session_on(engine), [wanted(LONG, *(f"row {n}" for n in range(2_000))), wanted(SHORT, "b")])
    assert len(engine.requests) < 1_000


def test_an_interrupt_ends_all_of_them(session_on: Callable[[Any], Session]) -> None:
    class Interrupted(EchoEngine):
        def complete(self, request: CompletionRequest) -> Completion:
            if request.prompt == "a stop":
                INTERRUPTS.raise_all()
            return super().complete(request)

    engine = Interrupted(row_seconds=0.05)
    many = [f"row {n}" for n in range(2_000)]
    with pytest.raises(KeyboardInterrupt):
        complete_together(session_on(engine), [wanted(LONG, *many), wanted(SHORT, "row", "a stop", *many)])
    assert len(engine.requests) < 2_000
