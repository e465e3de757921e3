"""The engine's child process: shared, restarted, and never left behind."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from complete_fn.engines.catalogue import Model
from complete_fn.errors import EngineError, EngineMissingError, UnknownModelError
from complete_fn.settings import Settings
from complete_fn.types import CompletionRequest, SamplingParams

pytestmark = pytest.mark.engine
PARENT = """
import itertools, os, sys, time
from pathlib import Path
from complete_fn.engines.catalogue import Model
from complete_fn.settings import Settings
from complete_fn.types import CompletionRequest, SamplingParams
from complete_fn_workers.engine.client import open_engine

folder, home, how = sys.argv[1:]
engine = open_engine(Model("tiny", folder, engine_args={"max_num_seqs": 8}), Settings(Path(home), None, 0.25))
rows = (CompletionRequest("tiny", f"row {n}", SamplingParams(max_tokens=8)) for n in itertools.count())
if how == "fork":
    next(engine.stream(rows, "me"))
    if os.fork() == 0:
        time.sleep(20)
        os._exit(0)
if how == "loading":
    engine.start()
    print("started", engine.child.pid, flush=True)
for done, (number, completion) in enumerate(engine.stream(rows, "me")):
    if done == 40:
        print("started", engine.pid, flush=True)
        if how == "exception":
            raise RuntimeError("the consumer fails")
        if how == "finish":
            break
"""


def alive(pid: int) -> bool:
    """Whether the process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone_within(pid: int, seconds: float) -> bool:
    until = time.monotonic() + seconds
    while alive(pid) and time.monotonic() < until:
        time.sleep(0.05)
    return not alive(pid)


def start_parent(folder: Path, home: Path, how: str) -> tuple[subprocess.Popen[str], int]:
    command = [sys.executable, "-c", PARENT, str(folder), str(home), how]
    parent = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert parent.stdout is not None
    said = parent.stdout.readline().split()
    if not said:
        raise AssertionError(parent.communicate()[1])
    return parent, int(said[1])


def rows(count: int | None = None, tokens: int = 8) -> Iterator[CompletionRequest]:
    numbers = itertools.count() if count is None else range(count)
    return (CompletionRequest("tiny", f"row {n}", SamplingParams(max_tokens=tokens)) for n in numbers)


def seconds(engine: Any, requests: Iterator[CompletionRequest]) -> float:
    began = time.monotonic()
    list(engine.stream(requests, "me"))
    return time.monotonic() - began


@pytest.fixture
def own_engine(needs_vllm: None, tiny_entry: Model, tmp_path: Path) -> Iterator[Any]:
    """An engine of the test's own, to be killed."""
    from complete_fn_workers.engine.client import open_engine

    opened = open_engine(tiny_entry, Settings(tmp_path, None, None))
    yield opened
    opened.close()


LONG = [pytest.param(how, marks=pytest.mark.long) for how in ("fork, then kill", "exception")]


@pytest.mark.parametrize("how", ["kill", "kill while loading", "ctrl-c", "finish", *LONG])
def test_no_orphan(needs_vllm: None, tiny_model: Path, tmp_path: Path, how: str) -> None:
    script = {"kill while loading": "loading", "fork, then kill": "fork"}.get(how, how)
    parent, child = start_parent(tiny_model, tmp_path, script)
    try:
        if "kill" in how:
            parent.kill()
        elif how == "ctrl-c":
            os.killpg(parent.pid, signal.SIGINT)  # as a terminal does, to all of the foreground group
        assert parent.wait(timeout=2.0 if how == "ctrl-c" else 10.0) is not None
        assert gone_within(child, 2.5), f"the engine {child} lives on after {how}"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(parent.pid, signal.SIGKILL)
        if alive(child):
            os.kill(child, signal.SIGKILL)
    _, errors = parent.communicate(timeout=10)
    expected = {"ctrl-c": "KeyboardInterrupt", "exception": "RuntimeError: the consumer fails"}.get(how)
    assert (errors.strip().splitlines() or [""])[-1] == (expected or ""), "something stray on the terminal"


def test_two_parents_starting_at_once_share_one_child(needs_vllm: None, tiny_model: Path, tmp_path: Path) -> None:
    found: list[tuple[subprocess.Popen[str], int]] = []
    starters = [
        threading.Thread(target=lambda: found.append(start_parent(tiny_model, tmp_path, "go on"))) for _ in range(2)
    ]
    for starter in starters:
        starter.start()
    for starter in starters:
        starter.join()
    (first, pid), (second, same) = found
    try:
        assert pid == same
        first.kill()
        time.sleep(2.5)
        assert alive(pid), "the second parent lost its engine with the first"
        second.kill()
        assert gone_within(pid, 2.5)
    finally:
        for parent in (first, second):
            parent.kill()
            parent.communicate()


def test_killed_engine_is_restarted_once_and_no_row_is_lost(own_engine: Any) -> None:
    seen: list[int] = []
    first = None
    for number, completion in own_engine.stream(rows(300), "me"):
        seen.append(number)
        assert completion.error is None
        if len(seen) == 20:
            first = own_engine.pid
            os.kill(own_engine.pid, signal.SIGKILL)
    assert sorted(seen) == list(range(300))
    assert own_engine.pid != first


@pytest.mark.long
def test_second_death_in_a_stream_is_an_engine_error_that_names_the_log(own_engine: Any) -> None:
    killed: set[int] = set()

    def consume() -> None:
        for _ in own_engine.stream(rows(), "me"):
            if own_engine.pid not in killed:
                killed.add(own_engine.pid)
                os.kill(own_engine.pid, signal.SIGKILL)

    with pytest.raises(EngineError, match=r"died twice") as raised:
        consume()
    assert len(killed) == 2
    assert str(own_engine.place.log) in str(raised.value)


def test_threads_share_the_engine_without_a_barrier(engine: Any) -> None:
    """A stream that never ends does not keep others from ending, and all answers find their rows."""
    endless = engine.stream(rows(tokens=2), "endless")
    next(endless)
    answers: dict[int, dict[int, str | None]] = {}

    def work(name: int) -> None:
        mine = [CompletionRequest("tiny", f"thread {name} row {n}", SamplingParams(max_tokens=4)) for n in range(60)]
        answers[name] = {n: c.text for n, c in engine.stream(mine, "me")}

    threads = [threading.Thread(target=work, args=(name,)) for name in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    endless.close()
    assert [len(answers[name]) for name in range(8)] == [60] * 8
    alone = [CompletionRequest("tiny", f"thread 3 row {n}", SamplingParams(max_tokens=4)) for n in range(60)]
    again = {n: c.text for n, c in engine.stream(alone, "me")}
    assert sum(again[n] == answers[3][n] for n in again) >= 59


def test_back_pressure_and_the_abort_of_a_closed_stream(engine: Any) -> None:
    drawn = 0

    def endless() -> Iterator[CompletionRequest]:
        nonlocal drawn
        for request in rows(tokens=400):
            drawn += 1
            yield request

    whole = seconds(engine, rows(32, tokens=400))
    stream = engine.stream(endless(), "me")
    for _ in range(40):
        next(stream)
    assert drawn <= 40 + 2 * 16
    stream.close()
    # The 32 rows of 400 tokens in flight would otherwise be ahead of these.
    assert seconds(engine, rows(16, tokens=1)) < whole / 2


def test_consumer_that_raises_frees_its_rows(engine: Any) -> None:
    def consume() -> None:
        for _ in engine.stream(rows(tokens=400), "me"):
            raise RuntimeError("enough")

    whole = seconds(engine, rows(32, tokens=400))
    with pytest.raises(RuntimeError, match="enough"):
        consume()
    assert seconds(engine, rows(4, tokens=1)) < whole / 2


def test_iterable_that_raises_is_the_callers_error(engine: Any) -> None:
    def broken() -> Iterator[CompletionRequest]:
        yield from rows(3)
        raise ConnectionResetError("the caller's own database")

    with pytest.raises(ConnectionResetError, match="own database"):
        list(engine.stream(broken(), "me"))


def test_engine_that_cannot_start_says_why(needs_vllm: None, tiny_model: Path, tmp_path: Path) -> None:
    from complete_fn_workers.engine.client import open_engine

    entry = Model("tiny", str(tiny_model), engine_args={"max_model_length": 10})
    engine = open_engine(entry, Settings(tmp_path, None, None))
    with pytest.raises(EngineError, match=r"no 'max_model_length'. Did you mean 'max_model_len'") as raised:
        list(engine.stream(rows(1), "me"))
    engine.close()
    assert str(tmp_path) in str(raised.value)


@pytest.mark.parametrize("lost", ["tokenizer.json", "config.json", "model.safetensors"])
def test_folder_that_is_no_model(make_tiny_model: Callable[..., Path], tmp_path: Path, lost: str) -> None:
    from complete_fn_workers.engine.client import open_engine

    folder = make_tiny_model()
    (folder / lost).unlink()
    with pytest.raises(UnknownModelError, match=lost.rpartition(".")[2]):
        open_engine(Model("tiny", str(folder)), Settings(tmp_path, None, None))


def test_missing_vllm_names_the_command(tiny_entry: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from complete_fn_workers.engine import launch
    from complete_fn_workers.engine.client import open_engine

    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: None)
    engine = open_engine(tiny_entry, Settings(tmp_path, None, None))
    with pytest.raises(EngineMissingError, match="complete-fn setup-engine"):
        list(engine.stream(rows(1), "me"))


def test_state_is_private_and_holds_no_prompt(engine: Any) -> None:
    list(engine.stream([CompletionRequest("tiny", "a secret phrase 4711", SamplingParams(max_tokens=2))], "me"))
    folder = engine.place.log.parent
    assert folder.stat().st_mode & 0o077 == 0
    assert engine.place.log.stat().st_mode & 0o077 == 0
    assert "4711" not in engine.place.log.read_text()


def test_long_state_path_still_gets_a_socket(tiny_entry: Model, tmp_path: Path) -> None:
    from complete_fn_workers.engine.launch import engine_place, engine_spec

    settings = Settings(tmp_path / ("long" * 40), None, None)
    place = engine_place(engine_spec(tiny_entry, settings), settings)
    assert len(os.fsencode(place.socket)) <= 100
    assert place.log.parent.parent == settings.home
    assert place.folder.stat().st_mode & 0o077 == 0


def test_parent_loads_neither_torch_nor_vllm() -> None:
    heavy = {"torch", "vllm", "transformers"}
    code = f"import sys, complete_fn_workers.engine.client; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
