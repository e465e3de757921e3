"""What one row gets from the embedded engine: answers, limits, errors, usage. One tiny Llama in float32."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from typing import Any

import pytest

from complete_fn.types import Completion, CompletionRequest, Message, Prompt, SamplingParams

pytestmark = pytest.mark.engine
SECTION = {
    "type": "object",
    "properties": {"section": {"enum": ["utils", "doc"]}, "copies": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["section", "copies"],
}


def ask(engine: Any, *prompts: Prompt, tenant: str = "me", schema: Any = None, **sampling: Any) -> list[Completion]:
    text = None if schema is None else json.dumps(schema)
    requests = [CompletionRequest("tiny", p, SamplingParams(**sampling), text) for p in prompts]
    answers = dict(engine.stream(requests, tenant))
    return [answers[n] for n in range(len(prompts))]


def code(completion: Completion) -> str | None:
    return completion.error.code if completion.error else None


def test_callers_limit_is_a_success_with_finish_reason_length(engine: Any) -> None:
    (answer,) = ask(engine, "Name the section", max_tokens=5)
    assert (answer.finish_reason, answer.error, answer.usage.completion_tokens) == ("length", None, 5)
    assert answer.text


def test_own_limit_is_truncated_and_keeps_the_text(engine: Any) -> None:
    (answer,) = ask(engine, "Name the section")
    assert code(answer) == "truncated"
    assert answer.text
    assert answer.usage.completion_tokens == 24  # the entry's default_max_tokens, not generation_config's 5
    assert answer.error is not None
    assert "24 tokens" in answer.error.message


def test_greedy_is_repeatable_and_the_checkpoints_sampling_does_not_leak_in(engine: Any) -> None:
    answers = ask(engine, *["Write a one-line synopsis"] * 6, max_tokens=20)
    assert len({a.text for a in answers}) == 1


def test_seed_repeats_and_its_absence_varies(engine: Any) -> None:
    prompt = "Write a one-line synopsis"
    seeded = ask(engine, *[prompt] * 4, max_tokens=20, temperature=1.0, seed=7)
    free = ask(engine, *[prompt] * 4, max_tokens=20, temperature=1.0)
    assert len({a.text for a in seeded}) == 1
    assert len({a.text for a in free}) > 1


def test_stop_string_ends_the_answer_and_is_left_out(engine: Any) -> None:
    (whole,) = ask(engine, "Name the section", max_tokens=20)
    assert whole.text is not None
    stop = whole.text[4:6]
    (cut,) = ask(engine, "Name the section", max_tokens=20, stop=(stop,))
    assert cut.finish_reason == "stop"
    assert cut.text == whole.text[: whole.text.index(stop)]


def test_prompt_too_long_names_its_tokens_and_the_limit(engine: Any) -> None:
    long, fits = ask(engine, "package " * 2000, "package", max_tokens=3)
    assert code(long) == "prompt_too_long"
    assert long.error is not None
    tokens = int(long.error.message.split()[3])
    assert tokens > 1024
    assert "1024" in long.error.message
    assert fits.error is None


def test_context_cuts_the_answer_even_with_a_callers_limit(engine: Any) -> None:
    (piece,) = engine.count_tokens([" x"])
    (room,) = ask(engine, " x" * ((1024 - 24) // piece), max_tokens=400)
    assert code(room) == "truncated"
    assert room.usage.prompt_tokens + room.usage.completion_tokens == 1024


@pytest.mark.parametrize("prompt", ["half \ud83d of it", ()], ids=["lone surrogate", "no messages"])
def test_prompt_that_cannot_be_sent_fails_alone(engine: Any, prompt: Prompt) -> None:
    before, bad, after = ask(engine, "one", prompt, "two", max_tokens=2)
    assert (code(before), code(bad), code(after)) == (None, "invalid_request", None)


def test_empty_prompt_and_four_byte_characters_are_legal(engine: Any) -> None:
    empty, music, mixed = ask(engine, "", "𝄞 clef", "日本語 ☃ 😀", max_tokens=3)
    assert [code(a) for a in (empty, music, mixed)] == [None] * 3
    assert music.usage.prompt_tokens > empty.usage.prompt_tokens


def test_megabyte_prompt_fails_and_holds_nobody_up(engine: Any) -> None:
    ask(engine, "warm", max_tokens=1)
    began = time.monotonic()
    huge, word, small = ask(engine, "some words and more " * 52_000, "x" * 1_000_000, "small", max_tokens=2)
    assert code(huge) == code(word) == "prompt_too_long"
    assert small.error is None
    assert time.monotonic() - began < 60


def test_messages_are_rendered_by_the_chat_template(engine: Any) -> None:
    turns = (Message("system", "be brief"), Message("user", "Name the section"))
    plain, same, more = ask(engine, "Name the section", (Message("user", "Name the section"),), turns, max_tokens=4)
    assert (plain.text, plain.usage.prompt_tokens) == (same.text, same.usage.prompt_tokens)
    assert more.usage.prompt_tokens > same.usage.prompt_tokens


def test_response_format_is_kept_by_a_model_that_knows_no_json(engine: Any) -> None:
    for answer in ask(engine, "Describe as JSON", "Again", schema=SECTION, max_tokens=60):
        assert answer.error is None
        value = json.loads(answer.text or "")
        assert value["section"] in ("utils", "doc")
        assert 0 <= value["copies"] <= 9


def test_what_the_grammar_cannot_enforce_is_checked_afterwards(engine: Any) -> None:
    impossible = SECTION | {"not": {"required": ["section"]}}
    (answer,) = ask(engine, "Describe as JSON", schema=impossible, max_tokens=60)
    assert code(answer) == "schema_mismatch"
    assert answer.text


def test_schema_cut_by_the_callers_limit_is_a_mismatch(engine: Any) -> None:
    (answer,) = ask(engine, "Describe as JSON", schema=SECTION, max_tokens=2)
    assert code(answer) == "schema_mismatch"


def test_shared_instruction_of_100_tokens_hits_the_cache(engine: Any) -> None:
    instruction = "An instruction that many rows share is cached once. "
    (tokens,) = engine.count_tokens([instruction])
    instruction *= -(-100 // tokens)
    ask(engine, instruction + "first", tenant="cache-a", max_tokens=1)
    (second,) = ask(engine, instruction + "second", tenant="cache-a", max_tokens=1)
    (other,) = ask(engine, instruction + "second", tenant="cache-b", max_tokens=1)
    assert second.usage.cached_tokens >= 96
    assert other.usage.cached_tokens == 0


def test_count_tokens_is_what_the_prompt_costs(engine: Any) -> None:
    texts = ["", "Name the section", "日本語", "half \ud83d"]
    counts = engine.count_tokens(texts)
    empty, name, japanese = ask(engine, *texts[:3], max_tokens=1)
    assert counts[0] == 0
    assert counts[3] > 0
    assert name.usage.prompt_tokens - empty.usage.prompt_tokens == counts[1]
    assert japanese.usage.prompt_tokens - empty.usage.prompt_tokens == counts[2]


def test_model_without_chat_template_gets_the_bare_prompt(
    needs_vllm: None, tmp_path: Any, make_tiny_model: Any
) -> None:
    from complete_fn.engines.catalogue import Model
    from complete_fn.settings import Settings
    from complete_fn_workers.engine.client import open_engine

    folder = make_tiny_model(seed=1)
    path = folder / "tokenizer_config.json"
    config = {k: v for k, v in json.loads(path.read_text()).items() if k != "chat_template"}
    path.write_text(json.dumps(config))
    bare = open_engine(Model("bare", str(folder), engine_args={"max_num_seqs": 4}), Settings(tmp_path, None, 0.25))
    try:
        empty, name = ask(bare, "", "Name the section", max_tokens=2)
        (tokens,) = bare.count_tokens(["Name the section"])
    finally:
        bare.close()
    assert (empty.error, empty.usage.prompt_tokens) == (None, 1)
    assert name.usage.prompt_tokens in (tokens, tokens + 1)


def test_options_may_change_from_row_to_row(engine: Any) -> None:
    base = CompletionRequest("tiny", "Name the section", SamplingParams(max_tokens=1))
    longer = replace(base, sampling=SamplingParams(max_tokens=9))
    answers = dict(engine.stream([base, longer, longer, base], "me"))
    assert [answers[n].usage.completion_tokens for n in range(4)] == [1, 9, 9, 1]


def test_device_seconds_of_the_rows_add_up_to_the_steps(engine: Any) -> None:
    """Rows that ask more take more; together they take no more than the time that passed."""
    asked = [CompletionRequest("tiny", f"Metered row {n} " * 20, SamplingParams(max_tokens=n)) for n in (1, 8, 16)]
    ask(engine, "warm up", max_tokens=1)
    began = time.monotonic()
    answers = dict(engine.stream(asked, "meter"))
    passed = time.monotonic() - began
    seconds = [answers[n].usage.device_seconds for n in range(3)]
    assert all(s > 0 for s in seconds)
    assert sum(seconds) <= passed
    assert seconds[0] < seconds[2]


def test_all_device_time_of_an_engine_is_in_the_ledger(engine: Any, tiny_entry: Any, tmp_path: Any) -> None:
    """Answered rows, a stream that is dropped half-way, an idle second: the lines add up to what the child metered."""
    import sqlalchemy as sa

    from complete_fn.engines.call import Call
    from complete_fn.execution.admission import Tools
    from complete_fn.execution.runner import run
    from complete_fn.history.device_time import note_device_time
    from complete_fn.store.store import Store
    from complete_fn.store.tables import ledger
    from complete_fn.text import text_column
    from complete_fn.types import Asker

    ask(engine, "warm up", max_tokens=1)
    engine.read_meter()
    told = engine.device_time
    told.take()  # of other tests
    metered, lost = told.metered, told.lost
    store = Store(tmp_path / "state.sqlite3")
    call = Call(tiny_entry, SamplingParams(max_tokens=8))
    run(call, text_column([f"Accounted row {n}" for n in range(6)]), Tools(engine, store), Asker("acme"))
    asked = [CompletionRequest("tiny", f"dropped {n}", SamplingParams(max_tokens=9 * n)) for n in (1, 90)]
    dropped = engine.stream(asked, "acme")
    _, given = next(dropped)  # its time is the caller's to note
    dropped.close()
    time.sleep(0.5)
    note_device_time(store, engine, tiny_entry)
    sums = sa.select(ledger.c.price_class, sa.func.sum(ledger.c.device_us)).where(
        ledger.c.engine == told.name, ledger.c.device_us > 0
    )
    of_engine = sa.select(ledger.c.tenant).where(ledger.c.price_class.in_(("idle", "aborted"))).distinct()
    with store.read() as connection:
        lines = dict(connection.execute(sums.group_by(ledger.c.price_class)).all())
        assert connection.execute(of_engine).scalars().all() == ["-"]
    store.close()
    assert set(lines) == {"input", "idle", "aborted"}
    assert lines["aborted"] == pytest.approx((told.lost - lost) * 1e6, abs=1)
    assert min(lines.values()) > 0
    assert lines["idle"] > 400_000
    noted = sum(lines.values()) / 1e6 + given.usage.device_seconds
    assert noted == pytest.approx(told.metered - metered, abs=2e-5)
