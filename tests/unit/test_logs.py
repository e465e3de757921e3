"""No control character of a stranger's reaches a log or a terminal, in whatever name it comes."""

from __future__ import annotations

import io
import logging
import unicodedata
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from complete_fn.cli.local_state import print_table
from complete_fn.cli.main import main
from complete_fn.cli.terminal import print_err, print_out
from complete_fn.logs import log_failure, logger, printable

# C0, DEL and C1; marks, overrides and isolates of direction; separators of lines; half a surrogate pair.
STEERING = [
    *map(chr, range(32)), *map(chr, range(127, 160)), *"\u061c\u200e\u200f\u2028\u2029\ufeff\ud800",
    *map(chr, range(0x202A, 0x202F)), *map(chr, range(0x2066, 0x206A)),
]  # fmt: skip
NAMES = st.lists(st.one_of(st.sampled_from(STEERING), st.characters(), st.just("a")), min_size=1).map("".join)
OF_STEERING = ("Cc", "Cf", "Cs", "Zl", "Zp")
EVIL = "\x1b]0;owned\x07\x9b31m\u202etxt\r\x08"


def steers(text: str, kept: str = "") -> list[str]:
    return [c for c in text if unicodedata.category(c) in OF_STEERING and c not in kept]


def test_the_characters_of_this_test_do_steer() -> None:
    assert steers("".join(STEERING)) == STEERING


@settings(deadline=None)
@given(NAMES)
@example("".join(STEERING))
def test_printable_text_has_no_character_that_steers(text: str) -> None:
    assert steers(printable(text)) == []
    assert printable(printable(text)) == printable(text)
    assert steers(printable(text, "\n\t"), "\n\t") == []
    if text.isprintable():
        assert printable(text) == text


@settings(deadline=None)
@given(NAMES)
@example("".join(STEERING))
def test_a_log_line_is_one_line_whoever_handles_it(text: str) -> None:
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        logger("server").warning("%s of %s", text, "b")
        logger("a room that is new").warning(text.replace("%", ""))
        log_failure(text, ValueError(text).with_traceback(trace()))
    finally:
        root.removeHandler(handler)
    lines = written.getvalue().split("\n")
    assert len(lines) == 4
    assert [steers(line) for line in lines] == [[]] * 4


def trace() -> object:
    try:
        raise ValueError
    except ValueError as error:
        return error.__traceback__


@settings(deadline=None, suppress_health_check=list(HealthCheck))
@given(NAMES)
@example("".join(STEERING))
def test_a_line_of_the_shell_steers_no_terminal(capsys: pytest.CaptureFixture[str], text: str) -> None:
    print_out(text)
    print_err(text)
    print_table([("NAME", "ROWS"), (text, "1")])
    told = capsys.readouterr()
    assert steers(told.out + told.err, "\n\t") == []


def test_names_of_columns_and_files_do_not_steer_the_terminal_and_stay_in_the_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models.toml").write_text('[models.echo]\ncheckpoint = "echo"\nengine = "echo"\n')
    monkeypatch.setenv("COMPLETE_FN_MODELS", str(tmp_path / "models.toml"))
    name = EVIL.replace("\r", "")
    source = f"text,{name}\none,two\n"
    (tmp_path / "in.csv").write_text(source, newline="")
    run = ["run", "--home", "home", "-m", "echo", "-p", "{text}", "in.csv"]
    assert main([*run, "-o", "out.csv"]) == 0
    assert (tmp_path / "out.csv").read_bytes().startswith(f"text,{name},completion\n".encode())
    assert main([*run[:6], "{none}", "in.csv", "-o", "more.csv"]) == 1
    assert main([*run[:-1], f"{EVIL}.csv", "-o", "more.csv"]) == 1
    assert main(["run", "--home", "home", "-m", EVIL, "-p", "{text}", "in.csv", "-o", "more.csv"]) == 1
    assert main([EVIL]) == 1
    assert main(["usage", "--home", "home", "--by", EVIL]) == 1
    told = capfd.readouterr()
    assert "owned" in told.err
    assert steers(told.out + told.err, "\n\t") == []
