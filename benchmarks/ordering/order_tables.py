"""Three real tables with different repeats, for the benchmarks that order fields: Debian's package index and its
dependencies, and the documented functions of the Python packages installed here."""

from __future__ import annotations

import ast
import random
import re
import site
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

from complete_fn.prompts.fields import FieldPrompt
from complete_fn_workers.demo_model.build import fetch_index
from complete_fn_workers.demo_model.corpus import Package, read_index, stanzas

CELL = 800  # characters of a cell at most
PYTHON = ("transformers", "sqlalchemy", "torch", "numpy", "pyarrow", "polars")
SOURCES = Path(next(iter(site.getsitepackages()), sys.prefix))


@dataclass(frozen=True)
class Table:
    """`rows` in the order of their source; every row has a value for each of `fields`.

    Attributes:
        sides: fields that determine each other, if each field is of one side and rows repeat in one of two sides.
    """

    name: str
    instruction: str
    fields: tuple[str, ...]
    rows: list[tuple[str, ...]]
    sides: tuple[tuple[int, ...], ...] = ()

    def prompts(self) -> list[FieldPrompt]:
        return [FieldPrompt(self.instruction, self.fields, row) for row in self.rows]


def index(folder: Path) -> Path:
    """Debian's package index in `folder`, fetched if it is not there."""
    lists = folder / "lists"
    if not any(lists.glob("*_Packages*")):
        fetch_index(folder)
    return lists


def tables(folder: Path, rows: int) -> list[Table]:
    """The three tables, each of `rows` rows drawn at random and left in the order of their source."""
    packages = read_index(index(folder))
    found = (of_packages(packages), of_dependencies(packages, index(folder)), of_functions())
    return [replace(t, rows=drawn(t.rows, rows)) for t in found]


def drawn(rows: list[tuple[str, ...]], count: int) -> list[tuple[str, ...]]:
    if len(rows) <= count:
        return rows
    return [rows[n] for n in sorted(random.Random(5).sample(range(len(rows)), count))]


def of_packages(packages: list[Package]) -> Table:
    """Attributes: a source has several packages, a maintainer many; few rows differ in what repeats."""
    fields = ("source", "section", "maintainer", "synopsis", "description")
    rows = [tuple(getattr(p, f)[:CELL] for f in fields) for p in packages]
    return Table("packages", "Name the audience of this Debian package in one word.", fields, rows)


def of_dependencies(packages: list[Package], lists: Path) -> Table:
    """Edges: a package needs many others, some others are needed by many, so rows differ in which side repeats."""
    known = {p.package: p for p in packages}
    fields = ("package", "package_description", "dependency", "dependency_description")
    rows = []
    for path in sorted(lists.glob("*_main_binary-*_Packages*")):
        for stanza in stanzas(path):
            package = known.get(stanza["Package"])
            for name in re.findall(r"(?:^|, )([a-z0-9][a-z0-9+.-]+)", stanza.get("Depends", "")):
                needed = known.get(name)
                if package is not None and needed is not None:
                    rows.append((package.package, text_of(package), needed.package, text_of(needed)))
    instruction = "Say in one word why the package needs the dependency."
    return Table("dependencies", instruction, fields, rows, sides=((0, 1), (2, 3)))


def text_of(package: Package) -> str:
    return f"{package.synopsis}\n{package.description}"[:CELL]


def of_functions() -> Table:
    """A hierarchy with copies: module over class over function, and documentation copied between modules."""
    fields = ("package", "module", "class", "signature", "documentation")
    rows: list[tuple[str, ...]] = []
    for package in PYTHON:
        for path in sorted((SOURCES / package).rglob("*.py")):
            rows += documented(package, path)
    return Table("functions", "Is this function for users or internal? Answer in one word.", fields, rows)


def documented(package: str, path: Path) -> Iterator[tuple[str, ...]]:
    try:
        tree = ast.parse(path.read_text("utf-8", "replace"))
    except (SyntaxError, ValueError, RecursionError):
        return
    module = f"{path.relative_to(SOURCES)}\n{ast.get_docstring(tree) or ''}"[:CELL]
    for owner in ast.walk(tree):
        if not isinstance(owner, ast.ClassDef):
            continue
        about = f"{owner.name}\n{ast.get_docstring(owner) or ''}"[:CELL]
        for node in owner.body:
            text = ast.get_docstring(node) if isinstance(node, ast.FunctionDef) else None
            if text and isinstance(node, ast.FunctionDef):
                signature = f"{node.name}({ast.unparse(node.args)})"[:CELL]
                yield summary_of(package), module, about, signature, text[:CELL]


def summary_of(package: str) -> str:
    try:
        return f"{package}: {metadata(package)['Summary']}"
    except PackageNotFoundError:
        return package
