"""A row at which the engine dies or hangs fails alone; all other rows of all streams are answered."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from complete_fn.engines.catalogue import Model
from complete_fn.errors import EngineError
from complete_fn.settings import Settings
from complete_fn.types import Completion, CompletionRequest, SamplingParams
from complete_fn_workers.engine import launch, stream
from complete_fn_workers.engine.client import EmbeddedEngine, open_engine
from complete_fn_workers.engine.link import RowSender

CHILD = Path(__file__).with_name("failing_child.py")


@pytest.fixture
def failing(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[EmbeddedEngine]:
    real = launch.child_command

    def command(place: launch.EnginePlace, listener: int, parent: int) -> list[str]:
        return [sys.executable, str(CHILD), *real(place, listener, parent)[4:]]

    monkeypatch.setattr(launch, "child_command", command)
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(stream, "HANG_SECONDS", 4.0)
    monkeypatch.setattr(stream, "FIRST_STEP_SECONDS", 4.0)
    opened = open_engine(Model("tiny", str(tiny_model)), Settings(tmp_path, None, None))
    yield opened
    opened.close()


def requests(prompts: list[str]) -> Iterator[CompletionRequest]:
    return (CompletionRequest("tiny", prompt, SamplingParams(max_tokens=2)) for prompt in prompts)


def answers(engine: Any, prompts: list[str], tenant: str = "me") -> list[str | None]:
    """The text or error code of each row; each row is answered once."""
    found: dict[int, Completion] = {}
    for number, completion in engine.stream(requests(prompts), tenant):
        assert number not in found
        found[number] = completion
    return [found[n].text or (e.code if (e := found[n].error) else None) for n in range(len(prompts))]


def expected(prompts: list[str]) -> list[str]:
    return ["engine_failed" if "poison" in p or "hang" in p else p for p in prompts]


@pytest.mark.parametrize("bad", [{0: "poison"}, {17: "poison", 18: "poison"}, {3: "poison", 30: "hang"}], ids=str)
def test_the_row_that_kills_its_engine_fails_and_the_others_are_answered(
    failing: EmbeddedEngine, bad: dict[int, str]
) -> None:
    prompts = [f"row {n} {bad.get(n, '')}" for n in range(40)]
    assert answers(failing, prompts) == expected(prompts)


def test_another_streams_poison_fails_no_row_of_ours(failing: EmbeddedEngine) -> None:
    theirs, ours = [f"row {n} {'poison' if n == 20 else ''}" for n in range(40)], [f"our {n}" for n in range(300)]
    found: dict[str, list[str | None]] = {}
    streams = [
        threading.Thread(target=lambda n=name, p=prompts: found.update({n: answers(failing, p, n)}), daemon=True)
        for name, prompts in (("theirs", theirs), ("ours", ours))
    ]
    for one in streams:
        one.start()
    for one in streams:
        one.join(60)
    assert found == {"theirs": expected(theirs), "ours": ours}


def test_an_engine_that_dies_at_many_rows_is_at_fault(failing: EmbeddedEngine) -> None:
    with pytest.raises(EngineError, match=r"died at 4 different rows"):
        answers(failing, [f"poison {n}" for n in range(40)])


def test_an_engine_that_dies_at_any_row_is_broken(failing: EmbeddedEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    dying_at(monkeypatch, lambda prompt: True)
    with pytest.raises(EngineError, match=r"died twice"):
        answers(failing, ["one", "two"])


def dying_at(monkeypatch: pytest.MonkeyPatch, kills: Callable[[str], bool]) -> None:
    """The child is killed when a row is sent at which `kills` is true."""
    real = RowSender.send

    def send(self: RowSender, rows: list[tuple[int, CompletionRequest]]) -> None:
        real(self, rows)
        if any(kills(str(request.prompt)) for _, request in rows):
            assert self.link.child is not None
            os.kill(self.link.child, signal.SIGKILL)

    monkeypatch.setattr(RowSender, "send", send)


@pytest.fixture
def own_engine(needs_vllm: None, tiny_entry: Model, tmp_path: Path) -> Iterator[Any]:
    opened = open_engine(tiny_entry, Settings(tmp_path, None, None))
    yield opened
    opened.close()


@pytest.mark.engine
def test_a_real_engine_that_hangs_is_restarted_and_its_rows_asked_again(
    own_engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "HANG_SECONDS", 5.0)
    list(own_engine.stream(requests(["warm"]), "me"))
    monkeypatch.setattr(stream, "FIRST_STEP_SECONDS", 5.0)
    done: dict[int, Completion] = {}
    first = own_engine.pid
    for number, completion in own_engine.stream(requests([f"row {n}" for n in range(60)]), "me"):
        done[number] = completion
        if len(done) == 10:
            os.kill(own_engine.pid, signal.SIGSTOP)
    assert sorted(done) == list(range(60))
    assert all(completion.error is None for completion in done.values())
    assert own_engine.pid != first


@pytest.mark.engine
@pytest.mark.long  # five starts of the engine
def test_a_real_engine_finds_the_row_that_kills_it(own_engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    dying_at(monkeypatch, lambda prompt: "poison" in prompt)
    done = dict(own_engine.stream(requests(["one", "poison", "three"]), "me"))
    assert [done[n].error and done[n].error.code for n in range(3)] == [None, "engine_failed", None]
