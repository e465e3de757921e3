"""`complete-fn run` that is broken off and given again: no row is lost, paid twice or left without its answer."""

from __future__ import annotations

import csv
import json
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import duckdb
import pytest
import sqlalchemy as sa

from complete_fn import EchoEngine
from complete_fn.engines.catalogue import Model
from complete_fn.spending.token_bound import PromptBound
from complete_fn.store.store import Store
from complete_fn.store.tables import ledger
from complete_fn.types import Completion

MODELS = '[models.echo]\ncheckpoint = "echo"\nengine = "echo"\nmax_model_len = 60\nprices = { input = 1, output = 1 }\n'
RUN = ("run", "-m", "echo", "-p", "{text}", "--quiet")
Shell = Callable[..., int]


@pytest.fixture
def shell(open_shell: Callable[..., Shell], monkeypatch: pytest.MonkeyPatch) -> Shell:
    """`complete-fn` with windows of 10 rows, in a folder of its own."""
    monkeypatch.setattr("complete_fn.rows.readers.BATCH_ROWS", 5)
    monkeypatch.setattr("complete_fn.rows.databases.BATCH_ROWS", 5)
    return open_shell(MODELS, 10)


class Asked:
    """Counts what the engine is asked; interrupts once, at the row of that number; rows of `failing` fail so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, self.at, stream = 0, 0, EchoEngine.stream
        self.failing: dict[int, str] = {}

        def counted(engine: EchoEngine, requests: Any, tenant: str) -> Iterator[Any]:
            for number, completion in stream(engine, requests, tenant):
                self.count += 1
                if self.count == self.at:
                    raise KeyboardInterrupt
                code = self.failing.get(self.count)
                yield number, completion if code is None else Completion.failed(code, "none today")

        monkeypatch.setattr(EchoEngine, "stream", counted)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    return Asked(monkeypatch)


def docs(keys: list[Any], kind: str = "integer primary key") -> None:
    with sqlite3.connect("in.db") as connection:
        connection.execute(f"CREATE TABLE docs (id {kind}, text text)")
        connection.executemany("INSERT INTO docs VALUES (?, ?)", [(k, f"row {n}") for n, k in enumerate(keys)])


FROM = ("sqlite:///in.db", "--table", "docs", "--key", "id")
INTO = ("-o", "sqlite:///out.db", "--into", "answers")


def written() -> int:
    with sqlite3.connect("out.db") as connection:
        return int(connection.execute("SELECT count(completion) FROM answers").fetchone()[0])


@pytest.mark.parametrize("target", ["sqlite:///out.db", "duckdb:///out.duckdb"])
def test_a_table_that_was_dropped_is_written_whole(shell: Shell, asked: Asked, target: str) -> None:
    docs(list(range(1, 31)))
    asked.at = 25
    command = (*RUN, *FROM, "-o", target, "--into", "answers")
    assert shell(*command) == 130
    if target.startswith("sqlite"):
        with sqlite3.connect("out.db") as connection:
            connection.execute("DROP TABLE answers")
    else:
        with duckdb.connect("out.duckdb") as con:
            con.execute("DROP TABLE answers")
    assert shell(*command) == 0
    if target.startswith("sqlite"):
        assert written() == 30
    else:
        with duckdb.connect("out.duckdb") as con:
            assert con.execute("SELECT count(completion) FROM answers").fetchall() == [(30,)]
    assert asked.count <= 32  # what was answered is not asked again


def test_with_other_columns_it_is_another_run(shell: Shell, asked: Asked) -> None:
    docs(list(range(1, 31)))
    asked.at = 25
    assert shell(*RUN, *FROM, *INTO) == 130
    with sqlite3.connect("out.db") as connection:
        connection.execute("DROP TABLE answers")
    assert shell(*RUN, *FROM, *INTO, "--details") == 0
    assert written() == 30


@pytest.mark.parametrize(
    ("keys", "kind"),
    [
        ([*range(1, 11), 10, *range(11, 21)], "integer"),
        ([f"k{n:02}" for n in range(9)] + ["kx", "KX"] + [f"l{n:02}" for n in range(9)], "text collate nocase"),
    ],
)
def test_a_key_on_both_sides_of_the_break_is_refused(
    shell: Shell, asked: Asked, keys: list[Any], kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    docs(keys, kind)
    asked.at = 13
    shell(*RUN, *FROM, *INTO)
    asked.at = 0
    capsys.readouterr()
    assert shell(*RUN, *FROM, *INTO) == 1
    assert "more than once" in capsys.readouterr().err


@pytest.mark.parametrize("row", [3, 13])
def test_a_row_before_the_break_that_may_find_its_answer_is_asked_again(shell: Shell, asked: Asked, row: int) -> None:
    docs(list(range(1, 51)))
    asked.at, asked.failing = 35, {row: "timeout"}
    assert shell(*RUN, *FROM, *INTO) == 130
    asked.at = 0
    mark = next(Path("home").glob("runs/*/mark.json"))
    assert json.loads(mark.read_text())[:2] == [3, row // 10]
    assert shell(*RUN, *FROM, *INTO) == 0
    assert written() == 50
    assert asked.count <= 35 + 20 + 1  # what was answered is not asked again
    assert not mark.exists()


def test_rows_before_the_break_that_failed_for_good_count(
    shell: Shell, asked: Asked, capsys: pytest.CaptureFixture[str]
) -> None:
    docs(list(range(1, 51)))
    command = [word for word in (*RUN, *FROM, *INTO) if word != "--quiet"]
    asked.at, asked.failing = 35, {3: "prompt_too_long"}
    assert shell(*command) == 130
    asked.at = 36
    assert shell(*command) == 130
    capsys.readouterr()
    assert shell(*command) == 3
    told = capsys.readouterr().err
    assert "50 rows" in told
    assert "1 failed: 1 prompt_too_long" in told


def test_a_strict_run_reads_the_rows_that_failed_before_the_break(
    shell: Shell, asked: Asked, capsys: pytest.CaptureFixture[str]
) -> None:
    docs(list(range(1, 51)))
    asked.at, asked.failing = 35, {3: "prompt_too_long"}
    assert shell(*RUN, *FROM, *INTO) == 130
    capsys.readouterr()
    assert shell(*RUN, *FROM, *INTO, "--strict") == 1
    assert "prompt_too_long" in capsys.readouterr().err


def test_a_mark_of_an_earlier_version_is_not_taken(shell: Shell, asked: Asked) -> None:
    docs(list(range(1, 51)))
    asked.at = 35
    assert shell(*RUN, *FROM, *INTO) == 130
    next(Path("home").glob("runs/*/mark.json")).write_text("[3, 30]")
    assert shell(*RUN, *FROM, *INTO) == 0
    assert written() == 50


def test_a_break_in_a_later_window_is_told(shell: Shell, asked: Asked, capsys: pytest.CaptureFixture[str]) -> None:
    texts("in.csv", 30)
    command = [word for word in (*RUN, "in.csv", "-o", "out.csv") if word != "--quiet"]
    asked.at = 15
    assert shell(*command) == 130
    capsys.readouterr()
    assert shell(*command) == 0
    assert "The last attempt was interrupted" in capsys.readouterr().err


def rows(path: str) -> list[dict[str, str]]:
    with open(path) as file:
        return list(csv.DictReader(file))


def texts(path: str, count: int, first: str = "row", more: str = "") -> None:
    lines = (f"{n},{first if n < 10 else 'row'} {n}{more}\n" for n in range(count))
    Path(path).write_text("id,text\n" + "".join(lines))


def test_rows_that_the_budget_refused_are_asked_when_there_is_more(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts("in.csv", 30)
    command = (*RUN, "in.csv", "-o", "out.csv", "--max-tokens", "5", "--max-total-tokens")
    kept: list[Path] = []

    def interrupted(place: Path, details: Any) -> None:
        real(place, details)
        kept.append(place)
        raise KeyboardInterrupt

    from complete_fn.cli import run_windows as windowed

    real = windowed.keep
    monkeypatch.setattr(windowed, "keep", interrupted)
    assert shell(*command, 30) == 130
    assert kept
    monkeypatch.setattr(windowed, "keep", real)
    assert shell(*command, 1_000_000) == 0
    assert [row["completion"] for row in rows("out.csv")] == [f"row {n}" for n in range(30)]


def test_what_a_broken_window_cost_counts_though_the_input_has_changed(shell: Shell, asked: Asked) -> None:
    words, cap = " w" * 40, 1_500
    texts("in.csv", 90, "old", words)
    asked.at = 30
    command = (*RUN, "in.csv", "-o", "out.csv", "--max-tokens", "2", "--max-total-tokens", cap)
    assert shell(*command) == 130
    texts("in.csv", 90, "new", words)
    shell(*command)
    store = Store(Path("home") / "state.sqlite3")
    paid = sa.select(sa.func.sum(ledger.c.tokens)).where(ledger.c.price_class.in_(("input", "cached_input", "output")))
    with store.read() as connection:
        assert cap - 200 < connection.execute(paid).scalar() <= cap
    store.close()


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("--key", "idd"), "no column of the input"),
        (("--key", "id", "--column", "id"), "is a column of the answers too"),
        (("--key", "id", "-o", "postgresql://nobody@127.0.0.1:9/none"), "cannot be used now"),
        (("--key", "text"), "more than once"),
    ],
)
def test_a_target_that_cannot_be_written_is_refused_before_a_row_is_paid(
    shell: Shell, asked: Asked, more: tuple[str, ...], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("in.csv").write_text("id,text\n" + "".join(f"{n},row {n % 7}\n" for n in range(25)))
    assert shell(*RUN, "in.csv", *INTO, *more) == 1
    assert told in capsys.readouterr().err
    assert asked.count == 0


def test_jsonl_into_a_table(shell: Shell) -> None:
    lines = [json.dumps({"id": n, "text": f"row {n}"}) for n in range(25)]
    Path("in.jsonl").write_text("\n".join(lines))
    assert shell(*RUN, "in.jsonl", *INTO, "--key", "id") == 0
    assert written() == 25


def test_the_prompts_of_an_endpoint_are_bounded_by_their_bytes_alone() -> None:
    text = "word " * 1_000
    own = PromptBound(Model("m", "m", engine="echo", max_model_len=40))
    other = PromptBound(Model("m", "m", engine="http", url="http://x", max_model_len=40))
    assert own.of(text) == 40
    assert other.of(text) > len(text)
