"""The dry run's figures against the truth: tokens against an exact count, price against the bill."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from complete_fn.engines.base import EchoEngine
from complete_fn.engines.call import Call
from complete_fn.engines.catalogue import Model, Prices
from complete_fn.engines.tokenizer import count_with, template_tokens, token_sizes, tokenizer_file
from complete_fn.estimates.estimate import TokenCount, count_cached, count_tokens, estimate, ratio_estimate
from complete_fn.estimates.estimate_report import report
from complete_fn.execution.admission import Tools
from complete_fn.execution.run_state import Work
from complete_fn.execution.runner import run
from complete_fn.planning import make_plan
from complete_fn.prompts.templates import pack_messages
from complete_fn.spending.budget import Budget
from complete_fn.store.store import Store
from complete_fn.text import text_column
from complete_fn.types import Asker, SamplingParams

PRICES = Prices(Decimal(2), Decimal(1), Decimal(8), "EUR", "yours")
WORDS = ["package", "manager", "the", "installs", "a", "text", "editor", "zebra", "12345", "éè", "quick", "brown"]


def prompts_of(count: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(1, 60))) for _ in range(count)]


def work_of(model: Model, column: Any) -> Work:
    plan = make_plan(column, sizes=token_sizes(model))
    return Work(plan, Asker(), False, [], [], found=[None] * len(plan.first))


def counted(model: Model, column: Any, sample: int = 1_000) -> TokenCount:
    work = work_of(model, column)
    return count_tokens(model, work, np.array(work.missing()), sample)


def test_a_small_table_is_counted(tiny_entry: Model) -> None:
    texts = list(dict.fromkeys(prompts_of(60)))[:50]
    found = counted(tiny_entry, text_column(texts))
    file = tokenizer_file(tiny_entry)
    assert file is not None
    assert found.total == sum(count_with(file, texts)) + 50 * (found.template or 0)
    assert (found.margin, found.counted, found.prompts) == (0, 50, 50)


def test_the_stated_interval_holds_the_truth_as_often_as_it_says(tiny_entry: Model) -> None:
    texts = prompts_of(400, seed=3)
    file = tokenizer_file(tiny_entry)
    assert file is not None
    counts = np.array(count_with(file, texts), np.float64)
    lengths = np.array([len(t.encode()) for t in texts], np.float64)
    held = 0
    for seed in range(400):
        drawn = np.random.default_rng(seed).choice(400, 60, replace=False)
        total, margin = ratio_estimate(counts[drawn], lengths[drawn], lengths.sum(), 400)
        held += abs(total - counts.sum()) <= margin
        assert margin < 0.2 * counts.sum()
    assert held >= 0.9 * 400


def test_a_large_table_is_sampled_and_says_so(tiny_entry: Model, tmp_path: Path) -> None:
    texts = list(dict.fromkeys(prompts_of(3000)))
    column = text_column(texts)
    exact = counted(tiny_entry, column, sample=10**9)
    found = counted(tiny_entry, column, sample=500)
    assert found.margin
    assert abs(found.total - exact.total) <= 2 * found.margin
    store = Store(tmp_path / "s")
    text = report(estimate(Call(tiny_entry), column, store, Asker(), "on"))
    assert f"at 95 %, 1,000 of {len(texts):,} prompts counted" in text


@pytest.mark.engine
def test_the_chat_templates_tokens_are_those_of_the_engine(needs_vllm: None, tiny_entry: Model) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_entry.checkpoint)
    turn = [{"role": "user", "content": "package"}]
    ids = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
    alone = tokenizer.encode("package", add_special_tokens=False)
    assert template_tokens(tiny_entry) == len(ids) - len(alone)


def test_without_a_tokenizer_it_says_what_it_rests_on(tmp_path: Path) -> None:
    model = Model("far", "far", engine="http", url="http://localhost:1/v1", prices=PRICES)
    found = estimate(Call(model), text_column(["x" * 350]), Store(tmp_path / "s"), Asker(), "on")
    assert found.tokens.margin is None
    assert "about 100, from 3.5 bytes a token: this model's tokenizer is not on this machine" in report(found)


def test_the_estimate_is_what_the_run_does(tmp_path: Path) -> None:
    """What is known, what is left, the most it costs and the likely cost, before and after a run."""
    model = Model("m", "m", engine="echo", default_max_tokens=100, prices=PRICES)
    call, store = Call(model), Store(tmp_path / "s")
    column = text_column([f"p {n % 30}" for n in range(40)] + [None])
    before = estimate(call, column, store, Asker(), "on", Budget(Decimal("0.001")))
    assert (before.rows, before.nulls, before.distinct, before.known, before.output) == (41, 1, 30, 0, 3000)
    assert (before.answers, before.seconds) == (None, None)
    assert "max cost       EUR 0.001 may not cover it" in report(before)
    bill = run(call, column, Tools(EchoEngine(), store), Asker()).summary
    after = estimate(call, column, store, Asker(), "on")
    assert (after.known, after.tokens.prompts, after.output) == (40, 0, 0)
    again = estimate(replace(call, sampling=SamplingParams(temperature=1.0)), column, store, Asker(), "on")
    assert (again.known, again.distinct, again.tokens.prompts) == (0, 40, 40)
    assert again.likely.completion_tokens == round(40 * bill.usage.completion_tokens / bill.computed)
    assert again.seconds is not None
    assert "likely" in report(again)


def test_conversations_are_counted_by_what_they_say(tiny_entry: Model) -> None:
    packed = pack_messages([{"role": "system", "content": "quick"}, {"role": "user", "content": "brown"}])
    found = counted(tiny_entry, text_column([packed]))
    file = tokenizer_file(tiny_entry)
    assert file is not None
    assert found.total == count_with(file, ["quick\nbrown"])[0] + (found.template or 0)


def test_the_cached_share_is_that_of_whole_blocks(tiny_entry: Model) -> None:
    """By hand: every prompt is tokenised with its template and compared with the one before it in byte order."""
    from complete_fn.engines.tokenizer import ids_with, template_around

    texts = ["package " * 40 + " ".join(random.Random(n).choices(WORDS, k=20)) for n in range(60)]
    work = work_of(tiny_entry, text_column(texts))
    file, around = tokenizer_file(tiny_entry), template_around(tiny_entry)
    assert file is not None
    assert around is not None
    ids = ids_with(file, [around[0] + t + around[1] for t in sorted(set(texts), key=str.encode)])
    block, cached = work.plan.sizes.block, 0
    for before, now in itertools.pairwise(ids):
        shared = next((n for n, (a, b) in enumerate(zip(before, now, strict=False)) if a != b), len(now))
        cached += min(shared, len(now) - 1) // block * block
    found = count_cached(tiny_entry, work, np.array(work.missing()))
    assert found is not None
    assert (found.total, found.margin) == (cached, 0)
    assert cached > 30 * block
    sampled = count_cached(tiny_entry, work, np.array(work.missing()), sample=30)
    assert sampled is not None
    assert abs(sampled.total - cached) <= 2 * max(sampled.margin, 1)


def test_a_cap_on_tokens_is_compared(tmp_path: Path) -> None:
    model = Model("m", "m", engine="echo", default_max_tokens=100, prices=PRICES)
    store, column = Store(tmp_path / "s"), text_column(["a b c"])
    e = estimate(Call(model), column, store, Asker(), "on", tokens=Budget(Decimal(50)))
    assert "max tokens     50 may not cover it" in report(e)
