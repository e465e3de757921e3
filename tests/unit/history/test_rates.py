"""Rates and lengths from past runs: found again where the truth is known, by tenant and by instruction."""

from __future__ import annotations

import random
import time
from dataclasses import replace
from pathlib import Path

import pytest

from complete_fn.engines.base import EchoEngine
from complete_fn.engines.call import Call
from complete_fn.engines.catalogue import Model
from complete_fn.execution.admission import Tools
from complete_fn.execution.runner import run
from complete_fn.history.run_history import Meter, Run, amounts, instruction, kind_of, lengths, past, rates
from complete_fn.planning import make_plan
from complete_fn.store.store import Store
from complete_fn.text import text_column
from complete_fn.types import Asker, Usage

MODEL = Model("m", "m", engine="echo")
TRUE = (0.001, 0.00002, 0.01, 0.005)  # seconds per uncached token, cached token, output token, row


def made(draw: random.Random, kind: bytes = b"k", scale: float = 1.0) -> Run:
    rows = draw.randint(50, 2_000)
    prompt = rows * draw.randint(20, 400)
    usage = Usage(prompt, int(prompt * draw.random() * 0.6), rows * draw.randint(1, 60))
    seconds = scale * sum(t * a for t, a in zip(TRUE, amounts(usage, rows), strict=True)) * draw.uniform(0.98, 1.02)
    return Run(kind, "d", rows, replace(usage, device_seconds=seconds), 0.0, 1.25 * seconds)


def test_the_time_of_the_next_run_is_foretold() -> None:
    draw = random.Random(3)
    found = [made(draw) for _ in range(12)]
    for _ in range(20):
        following = made(draw)
        known = rates(found, b"k")
        assert known is not None
        assert known.of(following.usage, following.rows) == pytest.approx(following.usage.device_seconds, rel=0.1)


def test_one_past_run_of_this_kind_sets_the_scale() -> None:
    draw = random.Random(4)
    found = [made(draw, b"slow", scale=2.0), *(made(draw) for _ in range(10))]
    following = made(draw, b"slow", scale=2.0)
    known = rates(found, b"slow")
    assert known is not None
    assert known.of(following.usage, following.rows) == pytest.approx(following.usage.device_seconds, rel=0.15)
    assert rates([], b"k") is None
    assert (known.clock, known.ends) == (pytest.approx(1.25), 0.0)


def metered(rows: int, seats: int, seconds: float) -> Run:
    """A run through an engine of so many seats, whose rows cost twice as much while it fills and empties."""
    meter, drawn = Meter(), 0
    for row in range(rows):
        while drawn < min(rows, row + 2 * seats):
            meter.draw()
            drawn += 1
        at_an_end = row < seats or row >= rows - seats
        meter.add(Usage(100, 0, 10, seconds * (2 if at_an_end else 1)))
    found = meter.run(Call(MODEL), make_plan(text_column(["x"])), "d")
    assert found is not None
    return found


def test_what_a_small_run_takes_to_fill_the_engine_is_not_taken_for_its_rate() -> None:
    small, large = metered(300, 64, 0.01), metered(10_000, 64, 0.01)
    assert (small.steady_rows, large.steady_rows) == (300 - 128, 10_000 - 128)
    known = rates([small], small.kind)
    assert known is not None
    assert known.ends == pytest.approx(128 * 0.01)
    assert known.of(large.usage, large.rows) == pytest.approx(large.usage.device_seconds)
    assert known.of(Usage(), 0) == 0.0


def test_a_run_without_a_middle_counts_whole() -> None:
    assert metered(140, 64, 0.01).body == (140, Usage(14_000, 0, 1_400))


def test_waiting_between_turns_is_no_time_of_the_engine() -> None:
    meter = Meter()
    for _ in range(10):
        meter.draw()
        time.sleep(0.002)
        meter.add(Usage(100, 0, 10))
        time.sleep(0.03)  # another run holds the reservations
    found = meter.run(Call(MODEL), make_plan(text_column(["x"])), "d")
    assert found is not None
    assert 0.02 <= found.seconds < 0.2
    assert found.usage.device_seconds == pytest.approx(found.seconds)


def test_a_run_beside_others_does_not_slow_the_clock_of_the_next() -> None:
    usage = Usage(1_000, 0, 100, 2.0)
    found = [Run(b"k", "d", 100, usage, 0.0, 2.0 * beside) for beside in (1.1, 4.0, 1.1, 3.9, 4.1)]
    known = rates(found, b"k")
    assert known is not None
    assert known.clock == pytest.approx(1.1)


def test_without_metered_devices_the_time_between_answers_stands_for_theirs(tmp_path: Path) -> None:
    store = Store(tmp_path / "s")
    run(
        Call(MODEL), text_column([f"Say: {n}" for n in range(40)]), Tools(EchoEngine(row_seconds=0.002), store), Asker()
    )
    (kept,) = past(store, "m")
    assert kept.usage.device_seconds == pytest.approx(kept.seconds, rel=0.2)
    assert kept.seconds >= 40 * 0.002


def test_answers_to_the_same_instruction_come_first() -> None:
    one = Run(b"a", "d", 100, Usage(0, 0, 300), 900.0, 1.0)
    other = Run(b"b", "d", 100, Usage(0, 0, 700), 4_900.0, 1.0)
    same, all_, few = lengths([one, other], b"a"), lengths([one, other], b"c"), lengths([one], b"a")
    assert same is not None
    assert (same.mean, same.margin, same.rows, same.same) == (3.0, 0.0, 100, True)
    assert all_ is not None
    assert (all_.mean, all_.same) == (5.0, False)
    assert few is not None
    assert lengths([Run(b"a", "d", 5, Usage(0, 0, 5), 5.0, 1.0)], b"a") is None


def test_the_instruction_is_what_all_prompts_begin_with() -> None:
    plan = make_plan(text_column([f"Name the section: {t}" for t in ("alpha beta", "alpha gamma", "zeta")]))
    assert instruction(plan) == "Name the section: "
    assert kind_of(Call(MODEL), plan) == kind_of(
        Call(MODEL), make_plan(text_column(["Name the section: x", "Name the section: y"]))
    )


def test_a_tenant_is_told_nothing_of_anothers_answers(tmp_path: Path) -> None:
    store, column = Store(tmp_path / "s"), text_column([f"Say: {n} " + "x " * 9 for n in range(40)])
    run(Call(MODEL), column, Tools(EchoEngine(), store), Asker(tenant="one"))
    assert [r.rows for r in past(store, "m", "one")] == [40]
    assert past(store, "m", "two") == []
    assert [r.usage.completion_tokens for r in past(store, "m")] == [40 * 11]
