"""Golden files: expected outputs below tests/golden. tests/README.md has the command that writes them anew.

Also what two test files share to make them: a recorder of shell sessions and the replacement of volatile values.
"""

from __future__ import annotations

import difflib
import json
import os
import pkgutil
import re
import shlex
import sqlite3
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from complete_fn import __version__

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden"
REWRITING = "REWRITE_GOLDEN"
WIDE = "1000"  # columns: argparse wraps nothing, and its versions wrap differently

# What differs from run to run, and what stands in the golden files for it. The first rule that fits wins.
VOLATILE = (
    (re.compile(r"\bcfn-[0-9a-f]{12}-[0-9a-f]{64}\b"), "<key>"),
    (re.compile(r"\b(chatcmpl-|cmpl-|file-|job_|batch_)[0-9a-f]{24}\b"), r"\1<id>"),
    (re.compile(r"(?<![\w-])[0-9a-f]{12}(?![\w-])"), "<id>"),
    (re.compile(r"\b[0-9a-f]{64}\b"), "<digest>"),
    (re.compile(r"\b\d[\d,]*\.\d s\b"), "<seconds> s"),
    (re.compile(r"\b\d[\d,]*\.\d MiB\b"), "<size> MiB"),
    (re.compile(r"\bfault [0-9a-f]{8}\b"), "fault <fault>"),
    (re.compile(r'(?<="bytes": )\d{5,}'), "<size>"),
)


def rewriting() -> bool:
    return bool(os.environ.get(REWRITING))


def check_golden(name: str, shown: str) -> None:
    """Compare a text with tests/golden/NAME, or write it there if REWRITE_GOLDEN is set."""
    path = GOLDEN / name
    if rewriting():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(shown, "utf-8")
        return
    expected = path.read_text("utf-8") if path.exists() else ""
    if shown != expected:
        lines = (text.splitlines(keepends=True) for text in (expected, shown))
        diff = "".join(difflib.unified_diff(*lines, f"tests/golden/{name}", "now", n=2))
        pytest.fail(f"The output has changed. If it should, run this again with {REWRITING}=1.\n{diff}", pytrace=False)


def check_names(pattern: str, names: Iterable[str]) -> None:
    """The golden files of that pattern are exactly these; when they are rewritten, others are removed."""
    wanted = {f"{Path(pattern).parent}/{name}" for name in names}
    found = {str(path.relative_to(GOLDEN)) for path in GOLDEN.glob(pattern)}
    if rewriting():
        for name in found - wanted:
            (GOLDEN / name).unlink()
        return
    assert sorted(found) == sorted(wanted)


def as_json(found: Any) -> str:
    """JSON as the golden files have it; the order of fields stays, so that a change of it is seen."""
    return json.dumps(found, indent=1, ensure_ascii=False) + "\n"


def normalised(text: str, names: Mapping[str, str]) -> str:
    """The text without what differs from run to run, by VOLATILE.

    Args:
        names: what else differs (a folder, an address), and what stands for it.
    """
    for value, shown in names.items():
        text = text.replace(value, shown)
    for pattern, shown in VOLATILE:
        text = pattern.sub(shown, text)
    for day in days_of_now():
        text = re.sub(rf"{day}([ T])\d\d:\d\d(:\d\d)?(\.\d+)?", r"<day>\1<time>", text).replace(day, "<day>")
    return text


def days_of_now() -> set[str]:
    """Today and its neighbours (a test may pass midnight, and local time is another day than UTC), the month's ends."""
    now = datetime.now(UTC).date()
    months = (now.replace(day=1), (now.replace(day=28) + timedelta(days=4)).replace(day=1))
    return {day.isoformat() for day in (now - timedelta(days=1), now, now + timedelta(days=1), *months)}


def plain_help(text: str) -> str:
    """argparse's text as no version of Python writes it: the help of an option on a line of its own.

    Python 3.13 has `-m, --model M`, earlier ones `-m M, --model M`; where the help begins depends on that too.
    """
    lines, inside = [], False
    for line in text.split("\n"):
        inside = line in ("options:", "positional arguments:") or (inside and line != "")
        entry = re.fullmatch(r"( {2,4})(\S.*?)(?: {2,}(\S.*))?", line) if inside else None
        if entry is None:
            lines.append(re.sub(r"^ {24}", " " * 8, line) if inside else line)
            continue
        lines.append(entry[1] + re.sub(r"^(-\w) (.+), (--\S+ \2)$", r"\1, \3", entry[2]))
        if entry[3]:
            lines.append(" " * 8 + entry[3])
    return "\n".join(lines)


def entry_point() -> Callable[[list[str]], int]:
    """What the command `complete-fn` calls, wherever that is."""
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["scripts"]
    found: Callable[[list[str]], int] = pkgutil.resolve_name(scripts["complete-fn"])
    return found


def plain_environment(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """No setting of whoever runs the tests reaches the commands, whose help has a fixed width.

    httpx reads the machine's certificates for each client, which takes longer than most commands; here are none.
    """
    for name in [name for name in os.environ if name.startswith("COMPLETE_FN_") or name == "SSL_CERT_FILE"]:
        patch.delenv(name)
    patch.setenv("SSL_CERT_DIR", str(folder))
    patch.setenv("COLUMNS", WIDE)
    patch.setenv("NO_COLOR", "1")


def environment() -> dict[str, str]:
    """For a child process that runs this working tree, whatever is installed."""
    rooms = [str(ROOT), *(str(ROOT / room) for room in ("connectors", "sql", "workers"))]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(rooms)}


class Transcript:
    """A shell session as text: commands, exit codes, what they print (stderr behind `!`), the files that they write.

    A command may name `<id>`, the last id that was printed, and what `names` have.
    """

    def __init__(self, folder: Path, capfd: pytest.CaptureFixture[str], names: Mapping[str, str] | None = None) -> None:
        self.folder, self.capfd = folder, capfd
        self.names = {**(names or {}), str(folder): "<folder>", f"complete-fn {__version__}": "complete-fn <version>"}
        self.main = entry_point()
        self.blocks: list[str] = []
        self.ids: list[str] = []
        self.files = self.contents()

    def run(self, command: str) -> None:
        """Run `complete-fn COMMAND` in this process; with `< FILE` in it, in one of its own."""
        given = command.replace("<id>", self.ids[-1] if self.ids else "<id>")
        for value, shown in self.names.items():
            given = given.replace(shown, value)
        self.capfd.readouterr()
        arguments, _, source = given.partition(" < ")
        words = shlex.split(arguments)
        code = self.piped(words, self.folder / source) if source else self.main(words)
        out, err = self.capfd.readouterr()
        self.note(f"complete-fn {command}".rstrip(), code, out, err)

    def piped(self, arguments: list[str], source: Path) -> int:
        with source.open("rb") as rows:
            return subprocess.run(
                [sys.executable, "-m", "complete_fn", *arguments], stdin=rows, env=environment(), timeout=120
            ).returncode

    def note(self, title: str, code: int, out: str, err: str) -> None:
        self.ids += re.findall(r"\b(?:job_[0-9a-f]{24}|(?<=cfn-)[0-9a-f]{12})\b", out)
        texts = [f"$ {title}\n"]
        for mark, text in (("", out), ("! ", err)):
            lines = self.plain(text).splitlines() if text else []
            texts += [f"{mark}{line}".rstrip() + "\n" for line in lines]
        texts.append(f"[exit code {code}]\n")
        before, self.files = self.files, self.contents()
        for path, found in self.files.items():
            if before.get(path) != found:
                texts.append(self.plain(f"[{path.name}]\n{shown_file(path)}".rstrip("\n") + "\n"))
        self.blocks.append("".join(texts))

    def contents(self) -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in sorted(self.folder.iterdir()) if path.is_file()}

    def plain(self, text: str) -> str:
        plain = normalised(text, self.names)
        # Some versions of Python quote the choices that an argument has, others do not.
        return re.sub(r"\(choose from [^)]*\)", lambda found: found[0].replace("'", ""), plain_help(plain))

    def text(self) -> str:
        return "\n".join(self.blocks)


def shown_file(path: Path) -> str:
    """A file as text; a table that is none as its columns and a JSON line for each row, a database as its tables."""
    import pyarrow as pa
    from pyarrow import parquet

    if path.suffix == ".db":
        with closing(sqlite3.connect(path)) as database:
            tables = database.execute(
                "SELECT name, sql FROM sqlite_master WHERE type = 'table' ORDER BY name"
            ).fetchall()
            return "\n".join(
                "\n".join([sql, *map(str, database.execute(f"SELECT * FROM {name} ORDER BY 1"))])
                for name, sql in tables
            )
    if path.suffix == ".parquet":
        table = parquet.read_table(path)
    elif path.suffix == ".arrow":
        table = pa.ipc.open_file(path).read_all()
    else:
        return path.read_text("utf-8", "backslashreplace")
    rows = [json.dumps(row, default=str, ensure_ascii=False) for row in table.to_pylist()]
    return "\n".join([*(f"{field.name}: {field.type}" for field in table.schema), *rows])
