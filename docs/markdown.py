"""Text, tables, code and documented functions as Markdown."""

from __future__ import annotations

import inspect
import json
import re
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

SECTION = re.compile(r"^(Args|Returns|Raises|Attributes):$", re.M)


def text(value: object) -> str:
    """Plain text as Markdown: outside of code marks and links, signs of Markdown and HTML stand for themselves."""
    pieces = re.split(r"(`[^`]*`)", str(value))
    pieces[::2] = [
        re.sub(r"([*\\])", r"\\\1", piece.replace("&", "&amp;").replace("<", "&lt;")).replace("|", "&#124;")
        for piece in pieces[::2]
    ]
    return " ".join("".join(pieces).split())


def code(value: object) -> str:
    return f"`{value}`"


def code_lines(value: str, width: int = 44) -> str:
    """Code for the first column of a table, which does not wrap: a long one in several lines."""
    return "<br> ".join(map(code, textwrap.wrap(value, width, break_long_words=False, break_on_hyphens=False)))


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Without the columns that no row has anything in."""
    kept = [n for n in range(len(head)) if any(row[n] for row in rows)]
    lines = [tuple(line[n] for n in kept) for line in (head, ["---"] * len(head), *rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def block(content: str, kind: str = "text") -> str:
    return f"```{kind}\n{content.strip(chr(10))}\n```\n"


def page(title: str, description: str, *parts: str) -> str:
    head = f"---\ndescription: {json.dumps(description, ensure_ascii=False)}\n---\n\n# {title}\n\n{description}\n\n"
    return head + "\n".join(part for part in parts if part)


def sentence(given: str) -> str:
    """With a capital letter, unless a name of the code comes first, and a full stop."""
    told = text(given).rstrip(".")
    first = told[:1] if re.match(r"\w+[._]\w", told) else told[:1].upper()
    return f"{first}{told[1:]}." if told else ""


def prose(given: str) -> str:
    """A docstring or a help text as Markdown; indented lines, and what looks like code, as code."""
    out = []
    for paragraph in re.split(r"\n\s*\n", given.strip()) if given.strip() else ():
        indented = all(line.startswith("  ") for line in paragraph.splitlines())
        if indented or re.match(r"[\w.]+\($|\S+ = |\S+\(.*\($", paragraph.splitlines()[0]):
            out.append(block(textwrap.dedent(paragraph)))
        else:
            out.append(text(paragraph) + "\n")
    return "\n".join(out)


def documented(name: str, thing: Callable[..., Any], level: int = 3) -> str:
    """A function or a class by its signature and its docstring."""
    described = thing.__init__ if inspect.isclass(thing) else thing
    signature = inspect.signature(described)
    shown = [str(p.replace(annotation=inspect.Parameter.empty)) for p in signature.parameters.values()]
    if named := [n for n, p in enumerate(signature.parameters.values()) if p.kind is p.KEYWORD_ONLY]:
        shown.insert(named[0], "*")
    shown = [s for s in shown if s != "self"]
    line = f"{name}({', '.join(shown)})"
    if len(line) > 72:
        line = f"{name}(\n    " + ",\n    ".join(shown) + ",\n)"
    parts = [f"{'#' * level} {name}\n", block(line, "py")]
    pieces = SECTION.split(inspect.getdoc(thing) or "")
    parts.append(prose(pieces[0]))
    for section, content in zip(pieces[1::2], pieces[2::2], strict=True):
        lines = re.split(r"\n(?=    \S)", "\n" + content.strip("\n"))[1:]
        entries = [text(textwrap.dedent(line)) for line in lines]
        if section in ("Args", "Attributes"):
            entries = [re.sub(r"^(\w+): ", r"`\1`: ", entry) for entry in entries]
            parts.append("\n".join(f"- {entry}" for entry in entries) + "\n")
        else:
            parts.append(f"**{section}** " + " ".join(entries) + "\n")
    return "\n".join(parts)
