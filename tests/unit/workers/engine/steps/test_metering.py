"""Device time of steps: divided without a remainder, by what rows computed, at costs learned from the steps."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from complete_fn.capacity.decoder_work import DecoderWork
from complete_fn_workers.engine.steps.metering import StepMeter
from complete_fn_workers.engine.steps.step_costs import REFIT, REMEMBERED, StepCosts
from tests.model_configs import LLAMA, SWIFT


@dataclass
class Request:
    """What the meter reads of vLLM's."""

    num_prompt_tokens: int
    num_computed_tokens: int = 0
    prefill_stats: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(num_cached_tokens=0))


def test_a_prompt_token_of_swiftkv_takes_about_half() -> None:
    assert DecoderWork.of(SWIFT).prompt == pytest.approx(0.55 * DecoderWork.of(LLAMA).prompt, rel=0.1)
    assert DecoderWork.of(SWIFT).output == DecoderWork.of(LLAMA).output
    meters = {name: StepMeter({"a": Request(500), "b": Request(1)}, DecoderWork.of(c)) for name, c in CONFIGS.items()}
    shares = {}
    for name, meter in meters.items():
        step_both(meter)
        (prompt, of_prompt), (answer, of_none) = meter.leave("a"), meter.leave("b")
        assert (of_prompt, of_none) == (prompt, 0.0)
        assert prompt + answer == pytest.approx(1.5)
        shares[name] = prompt / answer
    assert shares["swiftkv"] < 0.7 * shares["llama"]


CONFIGS = {"llama": LLAMA, "swiftkv": SWIFT}


def step_both(meter: StepMeter) -> None:
    """A step of 400 tokens of a's prompt and one of b's answer, where a step as such costs nothing."""
    meter.costs.costs = (1.0, 1.0, 0.0)
    for key in ("a", "b"):
        meter.admit(key, key)
    meter.requests["b"].num_computed_tokens = meter.rows["b"].computed = 1
    meter.requests["a"].num_computed_tokens, meter.requests["b"].num_computed_tokens = 400, 2
    meter.stepped(1.5)


def test_all_of_a_step_is_charged_and_none_twice() -> None:
    draw = random.Random(1)
    requests = {str(n): Request(draw.randint(1, 300)) for n in range(20)}
    meter, passed = StepMeter(requests, DecoderWork.of(LLAMA), devices=2), 0.0
    for key in requests:
        meter.admit(key, key)
    requests["3"].prefill_stats.num_cached_tokens = 32
    for _ in range(200):
        for request in requests.values():
            request.num_computed_tokens += draw.randint(0, 40)
        seconds = draw.uniform(0.01, 0.1)
        meter.stepped(seconds)
        passed += seconds
    assert meter.charged == pytest.approx(2 * passed)
    charges = [meter.leave(key) for key in requests]
    assert sum(whole for whole, _ in charges) == pytest.approx(2 * passed)
    assert all(0 < prompt < whole for whole, prompt in charges)
    meter.stepped(1.0)  # nothing was computed: idle
    assert meter.charged == pytest.approx(2 * passed)


def overlapping(**prompts: int) -> StepMeter:
    """Of vLLM's asynchronous scheduling: a call counts what it launches, and waits for the batch before."""
    return StepMeter({key: Request(tokens) for key, tokens in prompts.items()}, DecoderWork.of(LLAMA), overlaps=True)


def call(meter: StepMeter, seconds: float, **tokens: int) -> None:
    for key, more in tokens.items():
        if key not in meter.rows:
            meter.admit(key, key)
        meter.requests[key].num_computed_tokens += more
    meter.stepped(seconds)


def test_where_steps_overlap_a_call_is_charged_to_the_batch_that_it_waited_for() -> None:
    meter = overlapping(a=8000, b=100)
    call(meter, 0.002, a=8000)
    call(meter, 1.0, a=1, b=100)
    assert (meter.rows["a"].seconds, meter.rows["b"].seconds) == (pytest.approx(1.002), 0.0)
    call(meter, 0.02, a=1, b=1)
    charges = [meter.leave("a"), meter.leave("b")]
    assert 0.001 < charges[1][0] < 0.02
    assert sum(whole for whole, _ in charges) == pytest.approx(meter.charged) == pytest.approx(1.022)
    assert charges[0][1] == pytest.approx(1.002)


def test_where_steps_overlap_the_last_batch_is_charged_too() -> None:
    meter = overlapping(a=8000)
    call(meter, 0.002, a=8000)
    call(meter, 1.0)
    assert meter.leave("a") == (pytest.approx(1.002), pytest.approx(1.002))
    call(meter, 0.5)
    assert meter.charged == pytest.approx(1.002)  # idle


def test_where_steps_overlap_nobody_pays_for_what_a_row_before_had_launched() -> None:
    """A row's batch after its last token is not waited for; that of a row given up is, by nobody's charge."""
    meter = overlapping(a=8, b=100, c=8000, d=100)
    call(meter, 0.002, a=8)
    call(meter, 0.01, a=1)
    meter.leave("a")
    call(meter, 0.003, b=100)  # launched, with nothing to wait for
    call(meter, 0.03)
    assert meter.leave("b")[0] == pytest.approx(0.033)
    call(meter, 0.002, c=8000)
    meter.give_up("c")
    call(meter, 1.0, d=100)
    call(meter, 0.02)
    assert meter.leave("d")[0] == pytest.approx(0.02)
    assert meter.lost == pytest.approx(1.002)
    assert meter.charged == pytest.approx(0.012 + 0.033 + 1.022)


def test_where_steps_overlap_all_of_a_step_is_charged_and_none_twice() -> None:
    draw, answered, passed = random.Random(3), 0.0, 0.0
    meter = StepMeter({}, DecoderWork.of(LLAMA), devices=2, overlaps=True)
    for number in range(400):
        if draw.random() < 0.5:
            meter.requests[str(number)] = Request(draw.randint(1, 300))
            meter.admit(str(number), str(number))
        for key in meter.rows:
            meter.requests[key].num_computed_tokens += draw.randint(0, 40)
        seconds, batches = draw.uniform(0.01, 0.1), meter.charged
        meter.stepped(seconds)
        passed += 2 * seconds if meter.charged > batches else 0.0
        for key in [key for key in meter.rows if draw.random() < 0.2]:
            if draw.random() < 0.7:
                answered += meter.leave(key)[0]
            else:
                meter.give_up(key)
    under_way = sum(row.seconds for row in meter.rows.values())
    assert meter.charged == pytest.approx(passed)
    assert answered + under_way + meter.lost == pytest.approx(passed)
    assert passed > 30
    assert len(meter.costs.steps) > 200


def test_costs_are_learned_from_the_steps() -> None:
    """A device that reads memory slowly: a decoded token of a long context takes what it takes there."""
    decoder, draw = DecoderWork.of(LLAMA), random.Random(2)
    flop, byte, step = 2e-12, 3e-10, 1e-3
    costs = StepCosts(decoder)
    for _ in range(8 * REFIT):
        prompts = [decoder.work(0, n, n) for n in draw.choices(range(20, 400), k=draw.randint(0, 4))]
        answers = [decoder.work(n, n + 1, 10) for n in draw.choices(range(50, 4000), k=draw.randint(1, 30))]
        work = prompts + answers
        true = sum(flop * flops + byte * read + step / len(work) for flops, read in work)
        costs.learn(true * draw.uniform(0.95, 1.05), work)
    assert costs.costs[1] == pytest.approx(byte, rel=0.05)
    assert costs.costs[2] == pytest.approx(step, rel=0.1)
    long, short = costs.share([decoder.work(4000, 4001, 10), decoder.work(50, 51, 10)])
    true_long, true_short = (byte * 4001 * decoder.kv, byte * 51 * decoder.kv)
    assert long / short == pytest.approx((true_long + step / 2) / (true_short + step / 2), rel=0.1)


def test_a_step_that_took_no_time_teaches_nothing() -> None:
    costs = StepCosts(DecoderWork.of(LLAMA))
    before = costs.costs
    for _ in range(2 * REFIT):
        costs.learn(0.0, [(1.0, 1.0)])
    assert costs.costs == before


def test_whatever_the_steps_were_every_row_of_a_step_takes_something() -> None:
    """Steps that only decode, and take longer from some time on, can be explained without any cost of a FLOP."""
    decoder = DecoderWork.of(LLAMA)
    for seed in range(8):
        draw, costs = random.Random(seed), StepCosts(decoder)
        costs.learn(0.05, [decoder.work(0, 400, 400)])
        for n in range(2 * REMEMBERED):
            costs.learn((2.0 if n > 300 else 1.0) * draw.uniform(0.0095, 0.0105), [decoder.work(400 + n, 401 + n, 400)])
        assert min(costs.costs) > 0
        assert min(costs.share([decoder.work(0, 400, 400), decoder.work(900, 901, 400)])) > 0


@pytest.mark.parametrize(
    "config",
    [
        SimpleNamespace(hidden_size=64, num_hidden_layers=2, vocab_size=100),  # a state-space model
        SimpleNamespace(**{**vars(LLAMA), "intermediate_size": [128, 64]}),  # layers of several widths
        SimpleNamespace(**{**vars(LLAMA), "num_attention_heads": 0}),
    ],
)
def test_a_model_of_another_kind_is_charged_by_tokens(config: SimpleNamespace) -> None:
    decoder = DecoderWork.of(config)
    assert decoder.work(100, 130, 200) == (30.0, 0.0)
    assert decoder.work(300, 301, 200) == (1.0, 0.0)
    costs = StepCosts(decoder)
    for _ in range(2 * REFIT):
        costs.learn(0.01, [(30.0, 0.0), (1.0, 0.0)])
    long, short = costs.share([(30.0, 0.0), (1.0, 0.0)])
    assert long > short > 0
