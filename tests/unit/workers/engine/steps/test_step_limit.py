"""How much bulk work a step may take on while somebody chats."""

from __future__ import annotations

import math

from complete_fn_workers.engine.steps.step_limit import CHATTING_S, STEP_SECONDS, StepLimit


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_chats_first_step_takes_on_no_bulk_rows_but_chats_do_not_keep_them_out() -> None:
    pace = StepLimit(4096)
    assert [pace.takes_bulk(chats, 8) for chats in (0, 1, 1, 2, 0, 1, 0)] == [
        True,
        False,
        True,
        False,
        True,
        False,
        True,
    ]
    assert StepLimit(4096).takes_bulk(3, 0), "nothing runs: nothing is delayed by waiting"


def test_without_chats_nothing_is_held_back() -> None:
    pace = StepLimit(4096, Clock())
    pace.admit(4000)
    pace.stepped(1.0, 0)
    assert pace.room(64) == math.inf


def test_while_somebody_chats_steps_come_to_take_what_they_may() -> None:
    clock = Clock()
    pace = StepLimit(4096, clock)
    overhead, per_token = 0.005, 0.0002
    for _ in range(200):
        pace.chat()
        room = pace.room(10)
        tokens = 1000 if room == math.inf else max(0, int(room))
        pace.admit(tokens)
        seconds = overhead + per_token * (tokens + 10)
        pace.stepped(seconds, 10)
        clock.now += seconds
    assert abs(seconds - STEP_SECONDS) < 0.1 * STEP_SECONDS
    clock.now += CHATTING_S + 1
    assert pace.room(10) == math.inf


def test_cached_tokens_take_no_time() -> None:
    pace = StepLimit(4096, Clock())
    for _ in range(100):
        pace.finished(100, 90)
    pace.admit(1000)
    assert 100 <= pace.pending < 101


def test_a_prompt_longer_than_a_step_fills_the_next_ones() -> None:
    pace = StepLimit(512, Clock())
    pace.admit(1200)
    pace.stepped(1.0, 12)
    assert pace.pending == 700
    assert pace.rate == 512
