"""What our code needs of another library's insides, and what of it the installed library lacks.

A module that reads such insides has a table in its docstring (`vllm_internals`, `celery_internals`). An entry is one
line or more of `module:Class.function  name name ...`, then, indented, `reader.py, to do something. Why not publicly.`
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

ENTRY = re.compile(r"[\w.]+(:[\w.]+)?  \w+( \w+)*")


class Need(NamedTuple):
    """One name inside of another library, and who needs it for what.

    Attributes:
        owner: `module`, `module:Class` or `module:function`.
        name: of an attribute; of a function, of a parameter.
    """

    owner: str
    name: str
    reader: str
    purpose: str
    reason: str

    def __str__(self) -> str:
        return f"{short_name(self.owner)}.{self.name}"


def needs_in(table: str) -> list[Need]:
    """The entries of a module's docstring."""
    needs: list[Need] = []
    owners: list[tuple[str, list[str]]] = []
    told: list[str] = []
    for line in [*textwrap.dedent(table).splitlines(), ""]:
        if told and not line.startswith(" "):
            what, _, reason = " ".join(told).partition(". ")
            reader, _, purpose = what.partition(", ")
            needs += [Need(owner, name, reader, purpose, reason) for owner, names in owners for name in names]
            owners, told = [], []
        if ENTRY.fullmatch(line):
            owner, _, names = line.partition("  ")
            owners.append((owner, names.split()))
        elif owners and line.startswith("    "):
            told.append(line.strip())
    return needs


def complaint(library: str, version: str, need: Need, owner: Any = None) -> str | None:
    """What is missing, and what for; None if it is there.

    Args:
        owner: looked at instead of the library's own.
    """
    needs = f"{need.reader} {'need' if ' and ' in need.reader else 'needs'} {need.purpose}"
    if owner is None:
        try:
            owner = find(need.owner)
        except (ImportError, AttributeError):
            return f"{library} {version} has no {need.owner}, whose {need.name} {needs}."
    if has(owner, need.name):
        return None
    return f"{library} {version} has no {need}, which {needs}."


def imports_of(library: str, folder: Path) -> Iterator[Need]:
    """What the modules below a folder import from a library, by name."""
    for path in sorted(folder.rglob("*.py")):
        reader = str(path.relative_to(folder))
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == library:
                for alias in node.names:
                    yield Need(str(node.module), alias.name, reader, "to be importable", "It is public.")


def find(owner: str) -> Any:
    module, _, path = owner.partition(":")
    found: Any = import_module(module)
    for name in filter(None, path.split(".")):
        found = getattr(found, name)
    return found


def has(owner: Any, name: str) -> bool:
    if isinstance(owner, ModuleType):
        try:
            return hasattr(owner, name)
        except ImportError:  # a module may load a name only when it is asked for
            return False
    return name in names_of(owner)


def names_of(owner: Any) -> set[str]:
    """Parameters of a function; of a class what it and its instances have."""
    if not inspect.isclass(owner):
        return set(inspect.signature(owner).parameters)
    found = set(dir(owner))
    for base in owner.__mro__:
        found |= {*inspect.get_annotations(base), *assigned_in(base)}
    return found


def assigned_in(kind: type) -> Iterator[str]:
    """Attributes that the methods of a class give to `self`."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    except (OSError, TypeError):  # not written in Python
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
            yield node.attr


def is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


def without(need: Need, others: list[Need]) -> Any:
    """A stand-in for the owner that has all that is needed of it but this one name."""
    names = [other.name for other in others if other.owner == need.owner and other.name != need.name]
    _, _, path = need.owner.partition(":")
    own_name = path.rpartition(".")[2]
    if not path:
        module = ModuleType(need.owner)
        vars(module).update(dict.fromkeys(names))
        return module
    if own_name[0].isupper():
        return type(own_name, (), dict.fromkeys(names))
    scope: dict[str, Any] = {}
    exec(f"def stand_in({', '.join(names)}): ...", scope)  # noqa: S102 - names of our own table
    return scope["stand_in"]


def short_name(owner: str) -> str:
    module, _, path = owner.partition(":")
    return path or module
