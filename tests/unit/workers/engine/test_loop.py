"""The engine's loop without an engine: what one row or one parent does wrong is no other's trouble."""

from __future__ import annotations

import sys
from collections import defaultdict, deque
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from complete_fn.capacity.decoder_work import DecoderWork
from complete_fn_workers.engine.loop import AdmittedRow, EngineLoop, Isolation, WaitingRow
from complete_fn_workers.engine.steps.kv_window import KVWindow
from complete_fn_workers.engine.steps.metering import StepMeter
from complete_fn_workers.engine.steps.step_limit import StepLimit
from complete_fn_workers.engine.wire import RowRefused

SECRET = "text of the prompt"


class Parent:
    """What the loop reads of a connection."""

    tenant, default_max_tokens, closed = "", 16, False


class Outbox:
    """What the loop sent."""

    def __init__(self) -> None:
        self.sent: list[tuple[Any, dict[str, Any]]] = []

    def send(self, connection: Any, message: dict[str, Any]) -> None:
        self.sent.append((connection, message))


def fail(*_: Any) -> None:
    raise IndexError(SECRET)


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch) -> EngineLoop:
    """Of an engine that fails at every row, with a row `1` under way."""
    rows = ModuleType("complete_fn_workers.engine.rows")
    vars(rows).update(Sampling=fail, request_of=fail, tokens_of=fail)
    monkeypatch.setitem(sys.modules, rows.__name__, rows)
    made = EngineLoop.__new__(EngineLoop)
    request = SimpleNamespace(
        num_prompt_tokens=8, num_computed_tokens=0, prefill_stats=SimpleNamespace(num_cached_tokens=0)
    )
    made.connections, made.llm = Outbox(), SimpleNamespace(abort_request=lambda *_, **__: None)
    made.prompts, made.context = SimpleNamespace(), 64
    made.meter = StepMeter({"1-a": request}, DecoderWork.of(None))
    made.step_limit, made.window = StepLimit(64), KVWindow(8, 32)
    made.done, made.text = defaultdict(list), defaultdict(list)
    made.waiting, made.interactive, made.next = deque(), deque(), None
    made.running, made.running_bulk, made.isolation = {}, 0, Isolation()
    made.meter.admit("1", "1-a")
    request.num_computed_tokens = 8
    made.meter.stepped(1.5)
    return made


def test_a_row_that_cannot_be_read_is_refused(loop: EngineLoop) -> None:
    parent: Any = Parent()
    assert loop.prepare(WaitingRow(parent, 7, SECRET, None)) is None
    ((number, *answer),) = loop.done[parent]
    assert (number, answer[2]) == (7, "invalid_request")
    assert "IndexError" in answer[3]
    assert SECRET not in answer[3]


def test_a_row_whose_answer_cannot_be_read_ends_alone_and_is_charged(loop: EngineLoop) -> None:
    parent: Any = Parent()
    asked = SimpleNamespace(ids=[1] * 8, tokens=4, take=fail)
    loop.running["1"] = AdmittedRow(parent, 7, asked, "1-a", -1)
    loop.take_output(SimpleNamespace(request_id="1", finished=True, prompt_token_ids=[1] * 8, num_cached_tokens=0))
    ((number, *answer),) = loop.done[parent]
    assert (number, answer[2]) == (7, "invalid_request")
    assert SECRET not in answer[3]
    assert answer[-2:] == [1.5, 1.5]
    assert not loop.running


@pytest.mark.parametrize("last_word", [{"stop": True}, {"meter": True}])
def test_seconds_that_a_closed_parent_did_not_hear_are_told_to_the_next(
    last_word: dict[str, Any], loop: EngineLoop
) -> None:
    """It waited no longer for the child's last word, which comes between two steps."""
    gone, after = Parent(), Parent()
    loop.meter.lost = 2.5
    gone.closed = True
    loop.read(gone, last_word)
    loop.done[gone].append([7, "no", "stop", None, None, None, 8, 0, 1, 1.5, 1.5])
    loop.done[gone].append([8, *RowRefused("invalid_request", "No.").answer])
    loop.deliver()
    loop.read(after, {"meter": True})
    ((heard_by, message),) = loop.connections.sent
    assert heard_by is after
    assert message["meter"][2] == 2.5 + 1.5
