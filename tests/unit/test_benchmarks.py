"""Every benchmark stands in the README of its folder, and shows command lines that name the script itself."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HOME = ROOT / "benchmarks"
SCRIPTS = sorted(path.relative_to(ROOT).as_posix() for path in HOME.rglob("*.py"))


def readme_by_folder() -> dict[str, str]:
    parts = re.split(r"^\| `(\w+)/` \|", (HOME / "README.md").read_text(), flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_benchmark_stands_in_the_readme_under_its_folder(script: str) -> None:
    _, folder, name = script.split("/")
    assert f"`{name}`" in readme_by_folder()[folder]


def test_the_readme_and_the_figures_name_only_scripts_that_are_there() -> None:
    names = {path.rpartition("/")[2] for path in SCRIPTS} | {"test_chaos.py"}
    for page in ("README.md", "figures.md"):
        found = re.findall(r"`([\w/]+\.py)[` ]", (HOME / page).read_text())
        assert {name.rpartition("/")[2] for name in found if not name.startswith("daft/")} <= names, page


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_benchmark_shows_its_own_command_and_imports_what_is_there(script: str) -> None:
    tree = ast.parse((ROOT / script).read_text())
    shown = re.findall(r"^ +python (\S+)", ast.get_docstring(tree) or "", re.M)
    assert set(shown) <= {script}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("benchmarks."):
            other = ROOT / f"{(node.module or '').replace('.', '/')}.py"
            defined = {target for part in ast.parse(other.read_text()).body for target in names_of(part)}
            assert {alias.name for alias in node.names} <= defined, node.module


def names_of(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]
