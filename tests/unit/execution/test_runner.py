"""The main path on EchoEngine and on engines of our own: order, reuse, budgets, interruption, two askers at once."""

from __future__ import annotations

import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from complete_fn import CompletionWarning, EchoEngine, Session
from complete_fn.engines.call import Call
from complete_fn.engines.stoppable import StoppableEngine, Stopped
from complete_fn.errors import EngineError, InvalidOptionError, RowFailedError, UnknownModelError
from complete_fn.execution.admission import Tools
from complete_fn.execution.runner import run
from complete_fn.prompts.options import parse_options
from complete_fn.spending.budget import Budget
from complete_fn.store.tables import ledger
from complete_fn.text import text_column
from complete_fn.types import Asker, Completion, CompletionRequest, Usage


@pytest.fixture
def priced(tmp_path: Path) -> Path:
    path = tmp_path / "models.toml"
    path.write_text(
        "[models.echo]\ncheckpoint = 'echo'\nmax_model_len = 64\ndefault_max_tokens = 8\n"
        "prices = { input = 1, cached_input = 0.5, output = 2 }\n"
    )
    return path


def session(tmp_path: Path, priced: Path, engine: object | None = None, **more: object) -> Session:
    return Session(engine=engine or EchoEngine(64), home=tmp_path / "home", models_file=priced, **more)  # type: ignore[arg-type]


def lines(s: Session) -> list[dict[str, object]]:
    with s.store.read() as connection:
        return [dict(r) for r in connection.execute(sa.select(ledger)).mappings()]


def test_rows_come_back_in_their_order_with_nulls(tmp_path: Path, priced: Path) -> None:
    answers = session(tmp_path, priced).complete("echo", ["b b", None, "a", "b b", ""])
    assert answers.text.to_pylist() == ["b b", None, "a", "b b", ""]
    sources = [d and d["source"] for d in answers.details.to_pylist()]
    assert sources == ["computed", None, "computed", "duplicate", "computed"]


def test_row_costs_add_up_to_the_summary_and_to_the_ledger(tmp_path: Path, priced: Path) -> None:
    s = session(tmp_path, priced)
    answers = s.complete("echo", ["one two", "one two", "three", None])
    costs = [d["cost"] for d in answers.details.to_pylist() if d]
    assert sum(costs) == answers.summary.cost == Decimal(3 * 1 + 3 * 2) / 1_000_000
    billed = [line for line in lines(s) if line["cost_nano"]]
    assert sum(int(str(line["cost_nano"])) for line in billed) == 9_000
    (duplicate,) = [line for line in lines(s) if line["price_class"] == "duplicate"]
    assert (duplicate["rows"], duplicate["tokens"], duplicate["saved_nano"]) == (1, 4, 6_000)


def test_known_answers_are_not_asked_again_and_cost_nothing(tmp_path: Path, priced: Path) -> None:
    engine = EchoEngine(64)
    s = session(tmp_path, priced, engine)
    s.complete("echo", ["x", "y"])
    again = s.complete("echo", ["y", "x", "z"])
    assert len(engine.requests) == 3
    assert again.summary.reused == 2
    assert [d["source"] for d in again.details.to_pylist()] == ["cache", "cache", "computed"]
    assert again.details.to_pylist()[0]["cost"] == 0


@pytest.mark.parametrize(
    ("options", "asked"),
    [
        ({}, 1),
        ({"cache": "refresh"}, 2),
        ({"cache": "off"}, 2),
        ({"temperature": 0.5}, 4),
        ({"temperature": 0.5, "seed": 1}, 4),
        ({"max_tokens": 3}, 1),
    ],
)
def test_only_greedy_answers_are_merged_and_reused(
    tmp_path: Path, priced: Path, options: dict[str, object], asked: int
) -> None:
    engine = EchoEngine(64)
    s = session(tmp_path, priced, engine)
    s.complete("echo", ["x", "x"], options)
    s.complete("echo", ["x", "x"], options)
    assert len(engine.requests) == asked


def test_answers_differ_by_everything_that_changes_them(tmp_path: Path, priced: Path) -> None:
    engine = EchoEngine(64)
    s = session(tmp_path, priced, engine)
    for options in ({}, {"max_tokens": 1}, {"top_p": 0.5}, {"stop": "x"}, {"response_format": {"type": "object"}}):
        s.complete("echo", ["one two"], options)
    assert len(engine.requests) == 5


def test_another_tenant_pays_in_full(tmp_path: Path, priced: Path) -> None:
    engine = EchoEngine(64)
    for tenant in ("a", "b"):
        session(tmp_path, priced, engine, who=Asker(tenant=tenant)).complete("echo", ["x"])
    assert len(engine.requests) == 2


def test_echo_answers_are_never_taken_for_a_real_models(tmp_path: Path, priced: Path) -> None:
    session(tmp_path, priced, EchoEngine(64)).complete("echo", ["x"])

    class Other(EchoEngine):
        pass

    engine = Other(64)
    session(tmp_path, priced, engine).complete("echo", ["x"])
    assert len(engine.requests) == 1


def test_a_failed_row_is_null_warned_of_and_in_the_details(tmp_path: Path, priced: Path) -> None:
    s = session(tmp_path, priced)
    with pytest.warns(CompletionWarning, match="1 of 2 rows have no answer .1 prompt_too_long."):
        answers = s.complete("echo", ["ok", "w " * 100])
    assert answers.text.to_pylist() == ["ok", None]
    assert answers.details.to_pylist()[1]["error"]["code"] == "prompt_too_long"
    with pytest.raises(RowFailedError):
        s.complete("echo", ["w " * 100], {"strict": True})


def test_query_faults_are_raised_before_anything_is_asked(tmp_path: Path, priced: Path) -> None:
    engine = EchoEngine(64)
    s = Session(home=tmp_path, models_file=priced)
    with pytest.raises(UnknownModelError):
        s.complete("no-such-model", ["x"])
    with pytest.raises(InvalidOptionError):
        session(tmp_path, priced, engine).complete("echo", ["x"], {"temperature": 9})
    assert engine.requests == []


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prompts=st.lists(st.text("ab ", max_size=40), max_size=30), cap=st.integers(0, 400))
def test_a_budget_is_never_passed(tmp_path_factory: pytest.TempPathFactory, prompts: list[str], cap: int) -> None:
    tmp_path = tmp_path_factory.mktemp("budget")
    priced = tmp_path / "models.toml"
    priced.write_text("[models.echo]\ncheckpoint = 'e'\nmax_model_len = 64\nprices = { input = 1, output = 2 }\n")
    limit = Decimal(cap) / 1_000_000
    s = session(tmp_path, priced, max_cost=limit)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CompletionWarning)
        answers = s.complete("echo", prompts, {"max_tokens": 20})
    assert answers.summary.cost <= limit
    assert sum(int(str(line["cost_nano"])) for line in lines(s)) <= cap * 1_000
    for prompt, details in zip(prompts, answers.details.to_pylist(), strict=True):
        assert (details["value"] is not None) == (details["error"] is None), prompt


@pytest.mark.parametrize("cap", [0, 7, 30, 100, 1_000])
def test_max_total_tokens_is_never_passed(tmp_path: Path, priced: Path, cap: int) -> None:
    """A row is refused before it could pass the cap; what fits is answered, over several calls too."""
    s = session(tmp_path, priced, max_total_tokens=cap)
    prompts = [f"row number {n} " + "x " * (n % 5) for n in range(40)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CompletionWarning)
        for low in (0, 20):
            s.complete("echo", prompts[low : low + 20], {"max_tokens": 3})
    used, refused = s.summary.usage, s.summary.failed["budget_exceeded"]
    assert used.prompt_tokens + used.completion_tokens <= cap
    assert {0: refused == 40, 1_000: refused == 0}.get(cap, 0 < refused <= 40)


@pytest.mark.parametrize("cap", [-1, 1.5, True, "many"])
def test_a_token_cap_is_a_whole_number(tmp_path: Path, cap: object) -> None:
    with pytest.raises(InvalidOptionError, match="max_total_tokens"):
        Session(home=tmp_path, max_total_tokens=cap)  # type: ignore[arg-type]


def test_the_budget_holds_over_several_calls(tmp_path: Path, priced: Path) -> None:
    # One row may cost 65 tokens in and 8 out at most: 65 * 1 + 8 * 2 = 80 (the context bounds the prompt at 64).
    s = session(tmp_path, priced, max_cost="0.000100")
    assert s.complete("echo", ["a"]).text.to_pylist() == ["a"]
    with pytest.warns(CompletionWarning, match="budget_exceeded"):
        assert s.complete("echo", [f"b {n}" for n in range(40)]).text.null_count > 0
    assert s.summary.cost <= Decimal("0.000100")


class Slow(EchoEngine):
    """Echoes with a pause before each answer, and fails after `good` of them if told so."""

    def __init__(self, pause: float, good: int | None = None, error: BaseException | None = None) -> None:
        super().__init__(64)
        self.pause, self.good, self.error = pause, good, error

    def stream(self, requests: Iterable[CompletionRequest], tenant: str) -> Iterator[tuple[int, Completion]]:
        for position, completion in super().stream(requests, tenant):
            time.sleep(self.pause)
            if self.good is not None and position >= self.good and self.error is not None:
                raise self.error
            yield position, completion


@pytest.mark.parametrize("error", [EngineError("gone"), KeyboardInterrupt()])
def test_what_was_finished_before_a_fault_is_kept_and_not_paid_again(
    tmp_path: Path, priced: Path, error: BaseException
) -> None:
    prompts = [f"p {n}" for n in range(10)]
    with pytest.raises(type(error)):
        session(tmp_path, priced, Slow(0, 6, error)).complete("echo", prompts)
    engine = Slow(0)
    s = session(tmp_path, priced, engine)
    answers = s.complete("echo", prompts)
    assert answers.text.to_pylist() == prompts
    assert len(engine.requests) == 4
    assert sum(int(str(line["tokens"])) for line in lines(s) if line["price_class"] == "input") == 20


def test_a_slice_is_committed_by_time_even_when_the_engine_is_slow(
    tmp_path: Path, priced: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("complete_fn.execution.commits.SLICE_SECONDS", 0.1)
    s = session(tmp_path, priced, Slow(0.3))
    worker = threading.Thread(target=lambda: s.complete("echo", [f"p {n}" for n in range(20)]))
    worker.start()
    committed = 0
    while worker.is_alive() and not committed:
        time.sleep(0.05)
        committed = len([line for line in lines(s) if line["price_class"] == "output"])
    assert worker.is_alive(), "nothing was committed before the end"
    worker.join()
    assert committed >= 1


def test_two_threads_that_ask_the_same_pay_once(tmp_path: Path, priced: Path) -> None:
    engine = Slow(0.01)
    s = session(tmp_path, priced, engine)
    prompts = [f"p {n}" for n in range(30)]
    results: list[list[str]] = []
    workers = [
        threading.Thread(target=lambda: results.append(s.complete("echo", prompts).text.to_pylist())) for _ in range(4)
    ]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    assert results == [prompts] * 4
    assert len(engine.requests) == 30
    assert sum(int(str(line["tokens"])) for line in lines(s) if line["price_class"] == "input") == 60


def test_a_demonstration_model_warns_once_of_what_it_never_learnt(tmp_path: Path) -> None:
    s = Session(engine=EchoEngine(), home=tmp_path)
    with pytest.warns(CompletionWarning, match="demonstration model.*smollm2-360m"):
        s.complete("demo-llama", ["Write a poem."])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        s.complete("demo-llama", ["Write another."])
        s.complete("demo-llama", ["Name the section: x"])


class Odd(EchoEngine):
    """Does to each completion what it is told to."""

    def __init__(self, change: object) -> None:
        super().__init__(100_000)
        self.change = change

    def stream(self, requests: Iterable[CompletionRequest], tenant: str) -> Iterator[tuple[int, Completion]]:
        for position, completion in super().stream(requests, tenant):
            changed = self.change(position, completion)  # type: ignore[operator]
            if changed is not None:
                yield position, changed


def test_an_answer_with_a_lone_surrogate_is_kept_without_it(tmp_path: Path, priced: Path) -> None:
    engine = Odd(lambda _, c: replace(c, text="cut \ud83d"))
    assert session(tmp_path, priced, engine).complete("echo", ["a", "b"]).text.to_pylist() == ["cut \ufffd"] * 2


def test_an_engine_that_drops_a_row_is_an_error_and_not_asked_for_ever(tmp_path: Path, priced: Path) -> None:
    engine = Odd(lambda n, c: None if n == 1 else c)
    with pytest.raises(EngineError, match="1 of 3 rows unanswered"):
        session(tmp_path, priced, engine).complete("echo", ["a", "b", "c"])


def test_a_cap_holds_when_the_chat_template_is_long(tmp_path: Path) -> None:
    long = Odd(lambda _, c: replace(c, usage=Usage(c.usage.prompt_tokens + 400, 0, c.usage.completion_tokens)))
    models = tmp_path / "m.toml"
    models.write_text("[models.e]\ncheckpoint = 'e'\nprices = { input = 1, output = 1 }\n")
    s = session(tmp_path, models, long, max_cost="0.004")
    with pytest.warns(CompletionWarning, match="budget_exceeded"):
        answers = s.complete("e", [f"p {n}" for n in range(50)], {"max_tokens": 5})
    assert answers.summary.cost <= Decimal("0.004")
    assert answers.text.null_count < 50


def test_what_earlier_attempts_of_a_job_spent_counts_against_its_cap(tmp_path: Path, priced: Path) -> None:
    prompts = [f"p {n}" for n in range(40)]
    cap, options = Decimal("0.000200"), {"cache": "off", "max_tokens": 2}
    first = session(tmp_path, priced, Slow(0, 5, KeyboardInterrupt()), max_cost=cap)
    with pytest.raises(KeyboardInterrupt):
        first.complete("echo", prompts, options, "j")
    s = session(tmp_path, priced, Slow(0), max_cost=cap)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CompletionWarning)
        s.complete("echo", prompts, options, "j")
    assert Decimal(sum(int(str(line["cost_nano"])) for line in lines(s))).scaleb(-9) <= cap


def test_a_budget_counts_one_currency(tmp_path: Path) -> None:
    models = tmp_path / "m.toml"
    models.write_text(
        "[models.a]\ncheckpoint = 'a'\nprices = { input = 1 }\n"
        "[models.b]\ncheckpoint = 'b'\nprices = { currency = 'JPY' }\n"
    )
    s = session(tmp_path, models, max_cost=1)
    s.complete("a", ["x"])
    with pytest.raises(InvalidOptionError, match="max_cost counts USD, but 'b' is priced in JPY"):
        s.complete("b", ["x"])


@pytest.mark.parametrize("kind", [pa.string_view(), pa.dictionary(pa.int32(), pa.string())])
def test_any_string_type_can_be_asked(tmp_path: Path, kind: pa.DataType) -> None:
    s = Session(engine=EchoEngine(), home=tmp_path)
    column = pa.array(["Name the section: x", None]).cast(kind)
    assert s.complete("demo-llama", column).text.to_pylist() == ["Name the section: x", None]


def test_bytes_that_are_not_text_fail_their_row_only(tmp_path: Path, priced: Path) -> None:
    with pytest.warns(CompletionWarning, match="invalid_request"):
        answers = session(tmp_path, priced).complete("echo", pa.array([b"ok", b"\xff"]))
    assert answers.text.to_pylist() == ["ok", None]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_asks_with_connections_of_its_own(tmp_path: Path, priced: Path) -> None:
    s = session(tmp_path, priced, Slow(0.2))
    s.store.has_answers("local")  # a new store is open before the fork, however long that takes
    worker = threading.Thread(target=lambda: s.complete("echo", ["a", "b", "c"]))
    worker.start()
    time.sleep(0.3)  # mostly into the engine's pause, and into a transaction on a busy machine
    child = os.fork()
    if child == 0:
        signal.alarm(120)  # a lock that nobody releases would leave it here for good
        answers = s.complete("echo", ["a", "c"]).text.to_pylist()
        os._exit(0 if answers == ["a", "c"] else 1)
    worker.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_child_forked_while_another_thread_opens_the_store_opens_its_own(tmp_path: Path, priced: Path) -> None:
    s = session(tmp_path, priced)
    with s.lock:
        child = os.fork()
        if child == 0:
            signal.alarm(120)
            os._exit(0 if s.complete("echo", ["a"]).text.to_pylist() == ["a"] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_row_whose_reader_leaves_is_billed_as_far_as_it_was_told(tmp_path: Path, priced: Path) -> None:
    """And its budget pays it; nothing is told after the bill."""
    s, stop = session(tmp_path, priced), threading.Event()
    heard: list[tuple[int, str]] = []
    tells: list[Callable[[str, Usage], None]] = []

    class Telling(EchoEngine):
        def stream(self, requests: Iterable[CompletionRequest], tenant: str) -> Iterator[tuple[int, Completion]]:
            for request in requests:
                assert request.tell is not None
                tells.append(request.tell)
            tells[0]("one ", Usage(3, 0, 1))
            tells[0]("two ", Usage(3, 0, 2))
            stop.set()
            yield from ()
            time.sleep(1)

    def tell(row: int, piece: str, _: Usage) -> None:
        heard.append((row, piece))

    budget = Budget(Decimal(1))
    tools = Tools(StoppableEngine(Telling(), stop), s.store, budget, tell=tell)
    call = Call.of(s.model("echo"), parse_options({"max_tokens": 8}))
    with pytest.raises(Stopped):
        run(call, text_column(["a b c", "d", "a b c"]), tools, s.who)
    tells[0]("three", Usage(3, 0, 3))
    assert heard == [(0, "one "), (2, "one "), (0, "two "), (2, "two ")]
    assert budget.spent == Decimal(3 * 1 + 2 * 2) / 1_000_000
    assert budget.reserved == 0
    found = {str(line["price_class"]): (line["rows"], line["tokens"]) for line in lines(s)}
    assert found == {"input": (1, 3), "output": (1, 2), "duplicate": (1, 5)}
    assert s.complete("echo", ["a b c"], {"max_tokens": 8}).details.to_pylist()[0]["source"] == "computed"
