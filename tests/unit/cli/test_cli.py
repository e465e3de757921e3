"""The command line: verbs, exit codes, one-line faults, and what `run` writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import complete_fn
from complete_fn import registry as wiring
from complete_fn.cli import main as cli
from complete_fn.cli.local_state import moment
from complete_fn.cli.run_input import file_source
from complete_fn.execution.answers import DETAILS
from complete_fn.rows.formats import place_of

MODELS = """
[models.echo]
checkpoint = "echo"
engine = "echo"
max_model_len = 40
prices = { input = 1.0, cached_input = 0.1, output = 4.0, currency = "EUR", basis = "yours" }
[models.counted]
checkpoint = "FOLDER"
max_model_len = 1024
default_max_tokens = 24
prices = { input = 1.0, output = 4.0 }
"""

COMMAND = [sys.executable, "-c", "import sys; from complete_fn.cli.main import main; sys.exit(main())"]
Run = Callable[..., int]


@pytest.fixture
def shell(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """`complete-fn` in this process, in a folder of its own, with a model `echo`."""
    (tmp_path / "models.toml").write_text(MODELS.replace("FOLDER", str(tiny_model)))
    monkeypatch.setenv("COMPLETE_FN_MODELS", str(tmp_path / "models.toml"))
    monkeypatch.setenv("COMPLETE_FN_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        yield lambda *given: cli.main([str(g) for g in given])


@pytest.fixture
def table(tmp_path: Path) -> Path:
    found = pa.table({"id": [1, 2, 3, 4], "text": ["one", None, "", "one"], "n": [1.5, 2.0, 3.0, 4.0]})
    pq.write_table(found, tmp_path / "in.parquet")
    return tmp_path / "in.parquet"


def test_every_verb_has_a_line(shell: Run, capsys: pytest.CaptureFixture[str]) -> None:
    for given in ([], ["--help"]):
        assert shell(*given) == 0
        shown = capsys.readouterr().out
        assert all(f"  {verb} " in shown for verb in wiring.VERBS)
    assert (shell("--version"), capsys.readouterr().out) == (0, f"complete-fn {complete_fn.__version__}\n")
    assert shell("run", "--help") == 0


def test_help_loads_nothing_heavy() -> None:
    script = (
        "import sys; from complete_fn.cli.main import main; main([]);"
        "heavy = {'pyarrow', 'numpy', 'sqlalchemy', 'httpx', 'vllm', 'torch', 'tokenizers', 'tqdm'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.DEVNULL, timeout=60)


def test_rows_and_columns_as_they_were_and_the_answers_behind(shell: Run, table: Path) -> None:
    assert shell("run", "-m", "echo", "-p", "Say {text} {n}", table, "-o", "out.parquet") == 0
    found = pq.read_table("out.parquet")
    assert found.drop_columns(["completion"]).equals(pq.read_table(table))
    assert found["completion"].to_pylist() == ["Say one 1.5", None, "Say 3", "Say one 4"]


def test_details(shell: Run, table: Path) -> None:
    assert shell("run", "-m", "echo", "-p", "{text}", table, "-o", "o.parquet", "--details", "--column", "a") == 0
    details = pq.read_table("o.parquet")["a_details"]
    assert details.type == DETAILS
    first, null, empty, copy = details.to_pylist()
    assert (first["value"], first["source"], copy["source"], null) == ("one", "computed", "duplicate", None)
    assert (str(first["cost"]), copy["cost"], empty["value"]) == ("0.000005000", 0, "")


def test_a_failed_row_is_exit_code_3(shell: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"t": "\\ud800"}\n{"t": "fine"}\n{"t": "' + "long " * 50 + '"}\n')
    assert shell("run", "-m", "echo", "-p", "{t}", "in.jsonl", "--details", "-o", "out.jsonl") == 3
    rows = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert [r["completion"] for r in rows] == [None, "fine", None]
    codes = [(r["completion_details"]["error"] or {}).get("code") for r in rows]
    assert codes == ["invalid_request", None, "prompt_too_long"]
    assert rows[0]["t"] == "\ud800"
    told = capsys.readouterr().err
    assert "2 failed: 1 prompt_too_long, 1 invalid_request" in told
    assert "complete-fn: warning: 2 of 3 rows have no answer" in told


def test_strict_writes_nothing(shell: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"t": "\\ud800"}\n{"t": "fine"}\n')
    assert shell("run", "-m", "echo", "-p", "{t}", "in.jsonl", "--strict", "-o", "out.jsonl") == 1
    assert not Path("out.jsonl").exists()
    assert "1 of 2 rows have no answer (1 invalid_request)" in capsys.readouterr().err


RUN = ["run", "-m", "echo", "-p", "{text}", "in.parquet"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            ["run", "-m", "ecko", "-p", "{text}", "in.parquet"],
            "Model 'ecko' is not in the catalogue. Did you mean 'echo'",
        ),
        (["run", "-m", "echo", "-p", "{txt}", "in.parquet"], "{txt}, which is no column. Did you mean {text}?"),
        (["run", "-m", "echo", "-p", "{text", "in.parquet"], "The template has '{' at character 0"),
        (["run", "-m", "echo", "-p", "{text.upper}", "in.parquet"], "only {name} is replaced"),
        (["run", "-m", "echo", "-p", "{text}", "no.parquet"], "'no.parquet' cannot be read: No such file"),
        ([*RUN, "-o", "in.parquet"], "exists. Say --overwrite"),
        ([*RUN, "-o", "a/b.csv"], "cannot be written: No such file"),
        ([*RUN, "-o", "x.doc"], None),
        ([*RUN, "--temperature", "3"], "temperature = 3.0 must be"),
        ([*RUN, "--temperature", "x"], "invalid float value"),
        ([*RUN, "--option", "topp=1"], "Did you mean 'top_p'?"),
        ([*RUN, "--option", "top_p"], "not of the form name=value"),
        ([*RUN, "--limit", "-1"], "--limit -1 must be"),
        ([*RUN, "--max-cost", "x"], "max_cost = 'x' is not a number"),
        (
            ["run", "-m", "echo", "-p", "{text}", "in.parquet", "--response-format", "no.json"],
            "'no.json' cannot be read",
        ),
        (
            ["run", "-m", "echo", "-p", "{text}", "in.parquet", "--response-format", "bad.json"],
            "not a valid JSON schema",
        ),
        ([*RUN, "--column", "text"], "already has a column 'text'"),
        ([*RUN, "--engine", "localhost"], "is not an http"),
        (["run", "-m", "echo", "-p", "{text}", "-"], "The format of stdin is not known. Say --format"),
        (["run", "-p", "{text}", "in.parquet"], "required: -m/--model"),
        ([*RUN, "--query-tag", "t\udcff"], "'t\\udcff' has bytes that are not UTF-8"),
        (["w\udcff"], "has bytes that are not UTF-8"),
        (["walk"], "invalid choice: 'walk'"),
        (["cache"], "required: stats|clear"),
        (["usage", "--by", "week"], "--by 'week' is not one of hour, day, model, query_tag, job, user, tenant"),
        (["usage", "--since", "lately"], "neither a date"),
        (["usage", "--since", "9" * 400 + "d"], "neither a date"),
        (["usage", "--since", "9" * 5_000 + "d"], "neither a date"),
    ],
)
def test_query_faults_are_one_line_and_exit_code_1(
    shell: Run, table: Path, capsys: pytest.CaptureFixture[str], given: list[str], message: str | None
) -> None:
    Path("bad.json").write_text('{"type": 5}')
    code, (out, err) = shell(*given), capsys.readouterr()
    if message is None:  # an unknown suffix is written in the input's format
        assert (code, pq.read_table("x.doc").num_rows) == (0, 4)
        return
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert message in err
    assert err.startswith("complete-fn: ")


def test_a_fault_stops_before_anything_is_kept(shell: Run, table: Path) -> None:
    shell("run", "-m", "echo", "-p", "{txt}", table)
    assert not Path("home").exists()


def test_limit_and_overwrite(shell: Run, table: Path) -> None:
    Path("o.csv").write_text("before")
    assert shell("run", "-m", "echo", "-p", "{text}", table, "-o", "o.csv", "--limit", "1", "--overwrite") == 0
    assert Path("o.csv").read_text() == "id,text,n,completion\n1,one,1.5,one\n"


def test_options_reach_the_model(shell: Run, table: Path) -> None:
    given = ["run", "-m", "echo", "-p", "a b c {text}", table, "--limit", "1", "--details"]
    assert shell(*given, "--max-tokens", "2", "-o", "1.jsonl") == shell(
        *given, "--option", "max_tokens=2", "-o", "2.jsonl"
    )
    first, second = (json.loads(Path(name).read_text()) for name in ("1.jsonl", "2.jsonl"))
    assert first["completion"] == second["completion"] == "a b"
    assert second["completion_details"]["source"] == "cache"


def test_the_cache_can_be_off_and_refreshed(shell: Run, table: Path) -> None:
    sources = []
    for n, mode in enumerate(["on", "on", "off", "refresh"]):
        shell("run", "-m", "echo", "-p", "{text}", table, "--cache", mode, "--details", "-o", f"{n}.parquet")
        sources.append(pq.read_table(f"{n}.parquet")["completion_details"][0].as_py()["source"])
    assert sources == ["computed", "cache", "computed", "computed"]


def test_max_cost_is_never_passed(shell: Run, capsys: pytest.CaptureFixture[str]) -> None:
    pq.write_table(pa.table({"t": [f"word {n}" for n in range(100)]}), "in.parquet")
    given = ["--max-tokens", "2", "--max-cost", "0.0005", "-o", "o.parquet", "--details"]
    assert shell("run", "-m", "echo", "-p", "{t}", "in.parquet", *given) == 3
    details = pq.read_table("o.parquet")["completion_details"].to_pylist()
    assert 0 < sum(d["cost"] for d in details) <= 0.0005
    assert {d["error"]["code"] for d in details if d["error"]} == {"budget_exceeded"}


def test_quiet_says_nothing(shell: Run, table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert shell("run", "-m", "echo", "-p", "{text} " * 60, table, "-o", "o.csv", "--quiet") == 3
    assert capsys.readouterr() == ("", "")


def test_the_summary_is_one_line(shell: Run, table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shell("run", "-m", "echo", "-p", "{text}", table, "-o", "o.csv")
    err = capsys.readouterr().err
    assert err.startswith("4 rows · 2 distinct · 1 tokens in (0% cached) · 1 out · EUR 0.000005 at your prices")
    assert err.count("\n") == 1


def test_dry_run_says_what_it_takes_and_does_nothing(
    shell: Run, table: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("an engine was opened")

    monkeypatch.setattr("complete_fn.session.engine_for", refuse)
    assert shell("run", "-m", "counted", "-p", "{text}", table, "-o", "o.csv", "--dry-run", "--max-cost", "1") == 0
    out = capsys.readouterr().out
    assert "rows           4 (1 NULL: no answer, no cost)\ndistinct       2\n" in out
    assert "to compute     2 prompts with counted" in out
    assert "output tokens  at most 48 (24 each)" in out
    assert "at your prices" in out
    assert "USD 1 covers it" in out
    assert not Path("o.csv").exists()


def test_dry_run_knows_stored_answers(shell: Run, table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shell("run", "-m", "echo", "-p", "{text}", table, "-o", "o.csv")
    capsys.readouterr()
    shell("run", "-m", "echo", "-p", "{text}", table, "--dry-run")
    out = capsys.readouterr().out
    assert "known answers  3 rows" in out
    assert "price          at most EUR 0.000000" in out


def test_usage(shell: Run, table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert shell("usage") == 0
    assert capsys.readouterr().out == "Nothing was run yet.\n"
    shell("run", "-m", "echo", "-p", "{text}", table, "-o", "1.csv", "--query-tag", "a")
    shell("run", "-m", "echo", "-p", "{text}", table, "-o", "2.csv", "--query-tag", "b")
    capsys.readouterr()
    assert shell("usage", "--by", "query_tag", "--json") == 0
    first, second = json.loads(capsys.readouterr().out)
    assert (first["query_tag"], first["rows"], first["cost"], first["saved"]) == ("a", 3, 5e-6, 5e-6)
    assert (second["query_tag"], second["rows"], second["cost"], second["saved"]) == ("b", 3, 0, 1e-5)
    assert (first["currency"], first["basis"], first["input"], first["output"]) == ("EUR", "yours", 1, 1)
    shell("usage", "--csv", "--since", "1d")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("day,model,rows,input,cached,output,cost,currency,basis,saved,lost_rows")
    assert len(lines) == 2
    shell("usage", "--since", "2999-01-01")
    assert capsys.readouterr().out == "Nothing was run since then.\n"
    shell("usage")
    assert "EUR       yours" in capsys.readouterr().out


@pytest.mark.parametrize("zone", ["America/New_York", "Asia/Tokyo"])
def test_a_date_without_a_zone_is_in_utc_as_the_days_are(zone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        assert moment("2026-01-31") == 1_769_817_600.0
        assert moment("2026-01-31T02:00+02:00") == 1_769_817_600.0
    finally:
        monkeypatch.undo()
        time.tzset()


def test_cache(shell: Run, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shell("run", "-m", "echo", "-p", "{text}", table, "-o", "1.csv")
    shell("cache", "stats", "--home", tmp_path / "home", "--json")
    found = json.loads(capsys.readouterr().out)
    assert (found["path"], found["answers"], found["models"]) == (str(tmp_path / "home/state.sqlite3"), 2, {"echo": 2})
    shell("cache", "clear", "--model", "other")
    shell("cache", "clear", "--older-than", "1")
    shell("cache", "clear")
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()] == ["0", "0", "2"]
    shell("cache", "stats")
    assert f"{tmp_path / 'home/state.sqlite3'}\nanswers  0\n" in capsys.readouterr().out


def test_models(shell: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert shell("models") == 0
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("echo "))
    assert "EUR 1.0 / 0.1 / 4.0 (yours)" in line
    assert shell("models", "--json") == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    echo = next(m for m in found if m["name"] == "echo")
    assert echo["prices_per_million"] == {
        "input": 1, "cached_input": 0.1, "output": 4, "currency": "EUR", "basis": "yours"
    }  # fmt: skip


def test_a_catalogue_that_cannot_be_read_is_a_fault(shell: Run, capsys: pytest.CaptureFixture[str]) -> None:
    Path("models.toml").write_text("[models.x]\nchekpoint = 1\n")
    assert shell("models") == 1
    assert "no field 'chekpoint'. Did you mean 'checkpoint'?" in capsys.readouterr().err


def test_a_damaged_state_is_a_fault(shell: Run, table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("home").mkdir()
    Path("home/state.sqlite3").write_bytes(b"rubbish" * 1000)
    assert shell("run", "-m", "echo", "-p", "{text}", table) == 1
    assert "is not a database. Move the file away" in capsys.readouterr().err


def test_pipes(shell: Run, table: Path) -> None:
    for name in ("csv", "jsonl", "parquet", "arrow"):
        assert shell("run", "-m", "echo", "-p", "{text}", table, "--column", "a", "-o", f"first.{name}") == 0
        piped = [*COMMAND, "run", "-m", "echo", "-p", "{a}", "-", "--format", name]
        done = subprocess.run(piped, input=Path(f"first.{name}").read_bytes(), capture_output=True, timeout=60)
        assert done.returncode == 0, done.stderr
        Path(f"second.{name}").write_bytes(done.stdout)
        (found,) = file_source(place_of(f"second.{name}"))[0].windows()
        assert found.column("completion").to_pylist() == ["one", None, "", "one"], name
        assert found.names == ["id", "text", "n", "a", "completion"]


def test_a_reader_that_has_gone_is_no_traceback(shell: Run) -> None:
    pq.write_table(pa.table({"t": ["x" * 5000] * 2000}), "in.parquet")
    given = ["run", "-m", "echo", "-p", "{t}", "in.parquet", "--format", "jsonl", "--quiet"]
    unbuffered = {**os.environ, "PYTHONUNBUFFERED": "1"}  # where a raw write may be partial, and silent about it
    with subprocess.Popen([*COMMAND, *given], stdout=PIPE, stderr=PIPE, env=unbuffered) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        assert running.stdout.read(10) == b'{"t": "xxx'
        running.stdout.close()
        assert running.stderr.read() == b""
    assert running.returncode == 1
