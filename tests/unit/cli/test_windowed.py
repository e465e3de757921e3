"""`complete-fn run` over several windows: order, columns, resume, money, and inputs that are damaged far behind."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from complete_fn import EchoEngine
from complete_fn.cli.run_input import file_source
from complete_fn.errors import InputError
from complete_fn.rows.databases import Query
from complete_fn.rows.formats import TablePlace, common_schema, json_column, place_of
from complete_fn.rows.readers import FileSource
from complete_fn.service.sources import one_select

MODELS = '[models.echo]\ncheckpoint = "echo"\nengine = "echo"\nmax_model_len = 40\nprices = { input = 1, output = 1 }\n'
ROWS = 130
Run = Callable[..., int]


@pytest.fixture
def shell(open_shell: Callable[..., Run]) -> Run:
    """`complete-fn` with windows of 50 rows."""
    run = open_shell(MODELS, 50)
    texts = [None if n % 10 == 0 else f"row {n % 60}" for n in range(ROWS)]
    kinds = pa.array([f"kind {n // 50}" for n in range(ROWS)]).dictionary_encode()
    pq.write_table(pa.table({"id": range(ROWS), "text": texts, "kind": kinds}), "in.parquet")
    return run


RUN = ("run", "-m", "echo", "-p", "Say {text}")
SAID = [None if n % 10 == 0 else f"Say row {n % 60}" for n in range(ROWS)]


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl", "arrow", "csv.gz", "parquet.zst"])
def test_rows_come_back_in_order_in_every_format(shell: Run, kind: str) -> None:
    assert shell(*RUN, "in.parquet", "-o", f"a.{kind}", "--column", "first", "--quiet") == 0
    assert shell(*RUN, f"a.{kind}", "-o", "b.parquet", "--quiet") == 0
    found = pq.read_table("b.parquet")
    assert found.column_names == ["id", "text", "kind", "first", "completion"]
    assert [int(n) for n in found.column("id").to_pylist()] == list(range(ROWS))
    assert found.column("first").to_pylist() == found.column("completion").to_pylist() == SAID
    assert found.column("kind").to_pylist()[-1] == "kind 2"


def test_the_summary_is_that_of_all_windows(shell: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert shell(*RUN, "in.parquet", "-o", "b.parquet", "--details") == 0
    told = capsys.readouterr().err
    assert told.startswith("130 rows · ")
    assert told.count("\n") == 1
    sources = [d and d["source"] for d in pq.read_table("b.parquet").column("completion_details").to_pylist()]
    assert (sources[1], sources[61]) == ("computed", "cache")  # an equal prompt of an earlier window


@pytest.mark.parametrize("cache", ["on", "off"])
def test_a_broken_run_passes_by_the_windows_it_has(
    shell: Run, monkeypatch: pytest.MonkeyPatch, cache: str, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []
    stream = EchoEngine.stream

    def breaking(self: EchoEngine, requests: Any, tenant: str) -> Iterator[Any]:
        for found in stream(self, requests, tenant):
            asked.append(str(found[1].text))
            if len(asked) == 50:
                raise KeyboardInterrupt
            yield found

    monkeypatch.setattr(EchoEngine, "stream", breaking)
    given = (*RUN, "in.parquet", "-o", "b.parquet", "--cache", cache)
    assert shell(*given) == 130
    assert not Path("b.parquet").exists()
    assert [p.name[:13] for p in sorted(Path("home/runs").glob("*/*"))] == ["window-000000"]
    before = len(asked)
    Path("home/state.sqlite3-wal").unlink(missing_ok=True)
    assert shell(*given) == 0
    assert pq.read_table("b.parquet").column("completion").to_pylist() == SAID
    assert "resumed" in capsys.readouterr().err
    assert not set(asked[before:]) & {f"Say row {n}" for n in range(1, 50)} or cache == "off"
    assert not list(Path("home/runs").glob("*"))


def test_a_changed_input_is_not_answered_by_old_windows(shell: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("complete_fn.cli.run_windows.end", lambda _: None)
        patch.setattr("complete_fn.cli.run.end", lambda _: None)
        assert shell(*RUN, "in.parquet", "-o", "b.parquet", "--quiet") == 0
    table = pq.read_table("in.parquet")
    pq.write_table(table.set_column(1, "text", pa.array([f"new {n}" for n in range(ROWS)])), "in.parquet")
    assert shell(*RUN, "in.parquet", "-o", "b.parquet", "--quiet", "--overwrite") == 0
    assert pq.read_table("b.parquet").column("completion").to_pylist() == [f"Say new {n}" for n in range(ROWS)]


def test_the_cap_holds_over_windows_and_attempts(shell: Run) -> None:
    given = (*RUN, "in.parquet", "--max-tokens", "2", "--max-cost", "0.0003", "--details", "--quiet", "--cache", "off")
    assert shell(*given, "-o", "b.parquet") == 3
    details = [d for d in pq.read_table("b.parquet").column("completion_details").to_pylist() if d]
    assert 0.0002 < sum(d["cost"] for d in details) <= 0.0003
    assert {d["error"]["code"] for d in details if d["error"]} == {"budget_exceeded"}


def test_columns_that_come_late_and_change_their_type(shell: Run) -> None:
    rows = [{"n": n} if n < 60 else {"n": str(n), "late": n} for n in range(ROWS)]
    Path("in.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert shell("run", "-m", "echo", "-p", "{late}", "in.jsonl", "-o", "b.parquet", "--quiet") == 0
    found = pq.read_table("b.parquet")
    assert found.column("n").to_pylist() == [str(n) for n in range(ROWS)]
    assert found.column("completion").to_pylist() == [None if n < 60 else str(n) for n in range(ROWS)]
    assert shell("run", "-m", "echo", "-p", "{never}", "in.jsonl", "-o", "c.parquet") == 1


@pytest.mark.parametrize("kind", ["jsonl", "csv", "jsonl.gz"])
def test_damage_in_a_later_window_is_told_before_anything_is_run(
    shell: Run, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = '{"text": "a"}\n' if "jsonl" in kind else "a,b\n"
    head = "" if "jsonl" in kind else "text,b\n"
    whole = (head + line * 100 + '{"text"\n').encode()
    Path(f"in.{kind}").write_bytes(gzip.compress(whole) if kind.endswith("gz") else whole)
    assert shell(*RUN, f"in.{kind}", "-o", "b.parquet") == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert not Path("home").exists()


def test_a_dry_run_and_a_limit_cover_several_windows(shell: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert shell(*RUN, "in.parquet", "--dry-run") == 0
    assert "rows           130 (13 NULL" in capsys.readouterr().out
    assert shell(*RUN, "in.parquet", "--limit", "70", "-o", "b.parquet", "--quiet") == 0
    assert pq.read_table("b.parquet").column("completion").to_pylist() == SAID[:70]


def test_schemas_of_windows_are_joined() -> None:
    a = pa.schema([("x", pa.int64()), ("y", pa.string()), ("z", pa.int64())])
    b = pa.schema([("y", pa.string()), ("x", pa.float64()), ("z", pa.string()), ("w", pa.bool_())])
    joined = common_schema(common_schema(None, a), b)
    assert joined.names == ["x", "y", "z", "w"]
    assert joined.types == [pa.float64(), pa.string(), pa.large_string(), pa.bool_()]
    assert json_column([1, "a", None, {"k": 1}], pa.large_string()).to_pylist() == ["1", "a", None, '{"k": 1}']


@pytest.mark.parametrize("first", [2**53, 2**53 + 1, -(2**53) - 1, 2**64 - 1])
@pytest.mark.parametrize("turned", [False, True])
def test_integers_before_floats_keep_their_digits(shell: Run, first: int, turned: bool) -> None:
    """Of several windows, into columns of one type: float64 only where it holds every integer."""
    numbers = [first, 1, *[2] * 98, 0.5]
    numbers = numbers[::-1] if turned else numbers
    Path("in.jsonl").write_text("".join(json.dumps({"text": "a", "n": n}) + "\n" for n in numbers))
    assert shell(*RUN, "in.jsonl", "-o", "b.parquet", "--quiet") == 0
    found = pq.read_table("b.parquet").column("n").to_pylist()
    assert found == (numbers if first == 2**53 else [json.dumps(n) for n in numbers])


def test_an_empty_table_is_one_empty_window(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": pa.array([], pa.string())}), tmp_path / "e.parquet")
    (tmp_path / "e.jsonl").write_text("\n\n")
    (tmp_path / "e.csv").write_text("a,b\n")
    for name in ("e.parquet", "e.jsonl", "e.csv"):
        (rows,) = file_source(place_of(str(tmp_path / name)))[0].windows()
        assert rows.count == 0


def test_a_line_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("complete_fn.rows.readers.LINE_BYTES", 1000)
    (tmp_path / "x.jsonl").write_text('{"a": "' + "x" * 2000)
    source: FileSource = file_source(TablePlace(str(tmp_path / "x.jsonl"), "jsonl"))[0]
    with pytest.raises(InputError, match="more than 1,000 bytes"):
        list(source.windows())


@pytest.mark.parametrize("sql", ["select 'it''s (' as a", 'WITH x AS (SELECT 1 AS ")") SELECT * FROM x', "VALUES (1);"])
def test_a_select_with_quotes_and_parentheses(sql: str) -> None:
    assert Query(one_select(sql)).sql == f"SELECT * FROM ({sql.rstrip(';')}\n) AS rows_of_job"


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
def test_a_prompt_that_is_too_long_is_refused_before_a_row_is_paid(
    shell: Run, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    assert shell(*RUN, "in.parquet", "-o", f"a.{kind}", "--column", "said", "--quiet") == 0
    before = usage_lines(shell, capsys)
    assert shell("run", "-m", "echo", "-p", "{text}" * 1_000 + "x" * 4_194_000, f"a.{kind}", "-o", "out.csv") == 1
    assert "row 12 would have 4,200,000 bytes; at most 4,194,304 are taken. Shorten" in capsys.readouterr().err
    assert usage_lines(shell, capsys) == before
    assert not Path("out.csv").exists()


def usage_lines(shell: Run, capsys: pytest.CaptureFixture[str]) -> str:
    shell("usage")
    return capsys.readouterr().out


def test_a_template_that_is_too_long_is_refused_without_a_look_at_the_input(
    shell: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert shell("run", "-m", "echo", "-p", "x" * 4_194_305 + "{text}", "in.parquet", "-o", "out.csv") == 1
    assert "The template has 4,194,305 bytes" in capsys.readouterr().err


def test_a_long_template_makes_smaller_windows(shell: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("complete_fn.rows.readers.PROMPT_WINDOW_BYTES", 40 * len("Say "))
    seen: list[int] = []
    stream = EchoEngine.stream

    def counting(self: EchoEngine, requests: Any, tenant: str) -> Iterator[Any]:
        seen.append(1)
        return stream(self, requests, tenant)

    monkeypatch.setattr(EchoEngine, "stream", counting)
    assert shell(*RUN, "in.parquet", "-o", "b.parquet", "--cache", "off", "--quiet") == 0
    assert len(seen) == 4  # windows of 40 rows: 130 in four
    assert pq.read_table("b.parquet").column("completion").to_pylist() == SAID


def test_a_dry_run_bounds_all_prompts_together(
    shell: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("complete_fn.cli.run.ESTIMATE_PROMPT_BYTES", 1_000)
    assert shell(*RUN, "in.parquet", "--dry-run") == 1
    assert "at most 1,000 are taken. A dry run holds them all: --limit N takes fewer rows." in capsys.readouterr().err
    assert shell(*RUN, "in.parquet", "--dry-run", "--limit", "50") == 0
