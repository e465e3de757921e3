"""The house: light imports, a resolvable wiring table, rooms without stray modules, files of readable size."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import complete_fn
from complete_fn.errors import EngineMissingError
from complete_fn.registry import DIALECTS, ENGINES, VERBS, resolve

ROOT = Path(__file__).parents[2]
HEAVY = "vllm torch transformers pyarrow duckdb polars celery fastapi sqlalchemy numpy httpx"
SOURCES = [p for room in ("complete_fn", "connectors", "sql", "workers") for p in (ROOT / room).rglob("*.py")]


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = f"import sys, complete_fn; print([m for m in {HEAVY.split()!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_resolves() -> None:
    for name in complete_fn.__all__:
        assert getattr(complete_fn, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        complete_fn.nothing  # noqa: B018


def wired() -> Iterator[Any]:
    """Every target of the wiring table; SwiftKV's verbs need torch, which comes with the engine."""
    for target in (*DIALECTS.values(), *ENGINES.values(), *(verb.target for verb in VERBS.values())):
        yield pytest.param(target, marks=pytest.mark.engine if "swiftkv" in target else ())


@pytest.mark.parametrize("target", wired())
def test_every_entry_of_the_wiring_table_resolves(target: str) -> None:
    assert callable(resolve(target))


def test_a_missing_library_names_the_command_that_brings_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "needs_vllm.py").write_text("import vllm_absent_for_test\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(__import__("complete_fn.registry", fromlist=["x"]).REMEDIES, "vllm_absent_for_test", "do this")
    with pytest.raises(EngineMissingError, match=r"'vllm_absent_for_test' is not installed. Bring it with: do this"):
        resolve("needs_vllm:thing")


@pytest.mark.parametrize("room", ["connectors", "sql", "workers"])
def test_a_room_holds_exactly_one_package(room: str) -> None:
    assert not list((ROOT / room).glob("*.py"))
    assert [p.parent.name for p in (ROOT / room).glob("*/__init__.py")] == [f"complete_fn_{room}"]


def test_only_the_settings_read_the_environment() -> None:
    readers = {p.name for p in (ROOT / "complete_fn").rglob("*.py") if "os.environ" in p.read_text()}
    assert readers == {"settings.py"}


def test_files_and_functions_keep_a_readable_size() -> None:
    for path in SOURCES:
        text = path.read_text()
        assert text.count("\n") <= 500, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert (node.end_lineno or 0) - node.lineno < 80, f"{path}:{node.lineno} {node.name}"
                assert node.returns is not None, f"{path}:{node.lineno} {node.name} has no return type"


def test_no_room_goes_without_a_short_readme() -> None:
    for room in ("complete_fn", "connectors", "sql", "workers", "tests", "benchmarks"):
        lines = (ROOT / room / "README.md").read_text().splitlines()
        assert 0 < len(lines) <= 40, room
