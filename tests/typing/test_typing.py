"""The public names keep their types for users: `uses.py` passes mypy --strict, and a mistake in it does not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

USES = Path(__file__).with_name("uses.py")
ROOT = USES.parents[2]


def checked(path: Path) -> tuple[int, str]:
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(ROOT / ".mypy_cache"), str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout


@pytest.mark.timeout(600)
def test_a_users_code_type_checks() -> None:
    code, said = checked(USES)
    assert code == 0, said


@pytest.mark.timeout(600)
def test_a_users_mistake_is_found(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.py"
    wrong.write_text("from complete_fn import Usage\n\nUsage(prompt_tokens='three')\n")
    code, said = checked(wrong)
    assert code == 1
    assert 'expected "int"' in said
