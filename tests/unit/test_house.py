"""The house: light imports, a resolvable wiring table, rooms without stray modules, files of readable size."""

from __future__ import annotations

import ast
import importlib.util
import re
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
BESIDE = [p for room in ("tests", "benchmarks", "docs", "deploy") for p in (ROOT / room).rglob("*.py")]


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


@pytest.mark.parametrize("target", [*wired()])
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


def test_what_strangers_can_name_is_printed_and_logged_in_one_place_each() -> None:
    """`cli/terminal.py` and `logs.py` escape control characters. Two child processes print replies to their parent."""
    rooms = [p for p in SOURCES if p.is_relative_to(ROOT / "complete_fn")]
    printing = {p.name for p in rooms if re.search(r"(?<![\w.])print\(", p.read_text())}
    assert printing == {"terminal.py", "answer_check.py", "query_process.py"}
    logging_ = {p.name for p in SOURCES if re.search(r"getLogger\((?!\"(celery|kombu)\")", p.read_text())}
    assert logging_ == {"logs.py"}


def test_files_and_functions_keep_a_readable_size() -> None:
    for path in SOURCES + BESIDE:
        text = path.read_text()
        assert text.count("\n") <= 500, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert (node.end_lineno or 0) - node.lineno < 80, f"{path}:{node.lineno} {node.name}"
                typed = path in BESIDE or node.returns is not None
                assert typed, f"{path}:{node.lineno} {node.name} has no return type"


def rooms() -> list[Path]:
    """Folders of modules below the top-level rooms: those that must be walkable by themselves."""
    return sorted({p.parent for p in SOURCES if p.name != "__init__.py" and p.parent.parent != ROOT})


def test_no_room_goes_without_a_short_readme() -> None:
    for room in ("complete_fn", "connectors", "sql", "workers", "tests", "benchmarks"):
        lines = (ROOT / room / "README.md").read_text().splitlines()
        assert 0 < len(lines) <= 50, room
    for folder in rooms():
        if folder.name not in ("versions", "models", "examples") and not folder.name.startswith("complete_fn_"):
            lines = (folder / "README.md").read_text().splitlines()
            assert 0 < len(lines) <= 15, folder


def test_a_folder_holds_no_more_modules_than_can_be_overlooked() -> None:
    for folder in {p.parent for p in SOURCES + BESIDE}:
        modules = [p.name for p in folder.glob("*.py") if p.name != "__init__.py"]
        assert len(modules) <= 15, f"{folder}: {len(modules)}"


def test_readmes_name_files_that_are_there() -> None:
    for readme in (
        p for room in ("complete_fn", "connectors", "sql", "workers") for p in (ROOT / room).rglob("README.md")
    ):
        for name in re.findall(r"`([\w./-]+\.(?:py|toml|lock|sql))`", readme.read_text()):
            found = [*(folder / name for folder in readme.parents), *readme.parent.glob(f"*/{name}")]
            assert any(p.exists() for p in found), f"{readme}: {name}"


def test_a_class_name_stands_in_one_file() -> None:
    homes: dict[str, list[Path]] = {}
    for path in SOURCES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef):
                homes.setdefault(node.name, []).append(path)
    assert {name: files for name, files in homes.items() if len(files) > 1} == {}


def module_strings() -> Iterator[tuple[Path, str]]:
    """Strings of the code that name an object as `module:name`, or a module after `-m`."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                for found in re.findall(r"^(complete_fn[\w.]*:\w+)$|-m (complete_fn[\w.]*)", node.value):
                    yield path, "".join(found)


def test_every_string_that_names_a_module_resolves() -> None:
    found = list(module_strings())
    assert len(found) > 20
    for path, name in found:
        module, _, attribute = name.partition(":")
        spec = importlib.util.find_spec(module)
        assert spec is not None, f"{path}: {name}"
        assert spec.origin is not None
        defined = {
            target
            for node in ast.parse(Path(spec.origin).read_text()).body
            for target in (
                [node.name]
                if isinstance(node, ast.ClassDef | ast.FunctionDef)
                else [t.id for t in node.targets if isinstance(t, ast.Name)]
                if isinstance(node, ast.Assign)
                else []
            )
        }
        submodule = spec.submodule_search_locations and (Path(spec.origin).parent / attribute).exists()
        assert not attribute or attribute in defined or submodule, f"{path}: {name}"
