"""What the README shows is run: its Python blocks in order in one process, its shell lines, its printed answers."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```\n(?:\n^```text\n(.*?)^```\n)?", re.M | re.S)
BLOCKS = [(kind, code, shown) for kind, code, shown in BLOCK.findall(README)]
WORD = re.compile(r"[\w.+-]+")


def run(command: list[str], home: Path) -> str:
    environment = {
        **os.environ,
        "COMPLETE_FN_HOME": str(home),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def alike(shown: str, real: str) -> float:
    """The share of the shown words that the real output has too: bf16 answers may differ in a word on another CPU."""
    wanted, found = WORD.findall(shown), set(WORD.findall(real))
    return sum(w in found for w in wanted) / len(wanted)


@pytest.fixture(scope="module")
def printed(engine_home: Path) -> list[str]:
    """What each Python block prints, run one after the other in one process as a reader would."""
    end = "=== end of a block"
    code = f"\nprint({end!r})\n".join(code for kind, code, _ in BLOCKS if kind == "python")
    return run([sys.executable, "-c", code], engine_home).split(end)


@pytest.mark.engine
@pytest.mark.parametrize("number", range(sum(kind == "python" for kind, _, _ in BLOCKS)))
def test_a_python_block_prints_what_the_readme_shows(number: int, printed: list[str]) -> None:
    shown = [shown for kind, _, shown in BLOCKS if kind == "python"][number]
    assert printed[number].strip()
    if shown:
        assert alike(shown, printed[number]) >= 0.9, printed[number]


@pytest.mark.engine
def test_the_shell_lines_run(engine_home: Path, tmp_path: Path) -> None:
    lines = [line for kind, code, _ in BLOCKS if kind == "sh" for line in code.replace("\\\n", " ").splitlines()]
    ours = [line for line in lines if line.startswith("complete-fn ") and "setup-engine" not in line]
    assert ours
    for line in ours:
        run(shlex.split(line.replace("/tmp/", f"{tmp_path}/").partition(" #")[0]), engine_home)


def test_every_make_target_that_the_readme_names_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"`?make ([a-z-]+)`?", README)):
        assert f"\n{target}:" in makefile, target


def test_every_file_that_the_readme_names_exists() -> None:
    for name in set(re.findall(r"(?:benchmarks|sql|workers|connectors|tests|deploy)/[\w./-]+\w", README)):
        assert (ROOT / name).exists(), name
