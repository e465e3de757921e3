"""Debian's package index becomes training text: packages, splits and the three instructions."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import lz4.frame

SECTION = "Name the section: "
SYNOPSIS = "Write a one-line synopsis: "
AS_JSON = "Describe as JSON: "
INSTRUCTIONS = (SECTION, SYNOPSIS, AS_JSON)


@dataclass(frozen=True, slots=True)
class Package:
    """One binary package. `description` is the field Description-en, unfolded and without its first line."""

    package: str
    source: str
    section: str
    maintainer: str
    synopsis: str
    description: str


def stanzas(path: Path) -> Iterator[dict[str, str]]:
    """The control-file stanzas of one (lz4-compressed) index file, with continuation lines."""
    raw = lz4.frame.decompress(path.read_bytes()) if path.suffix == ".lz4" else path.read_bytes()
    for block in raw.decode("utf-8").split("\n\n"):
        fields: dict[str, str] = {}
        name = ""
        for line in block.split("\n"):
            if line[:1] in (" ", "\t"):
                fields[name] += "\n" + line
            elif ":" in line:
                name, _, value = line.partition(":")
                fields[name] = value.strip()
        if fields:
            yield fields


def unfold(folded: str) -> tuple[str, str]:
    """(synopsis, text) of a Description field (Debian policy 5.6.13). A line loses one leading space; " ." is empty."""
    synopsis, _, rest = folded.partition("\n")
    lines = ["" if line == " ." else line[1:] for line in rest.split("\n")]
    return synopsis.strip(), "\n".join(lines).strip("\n")


def read_index(folder: Path) -> list[Package]:
    """All packages with a long description in the apt lists of `folder`, once each, sorted by name."""
    texts: dict[str, tuple[str, str]] = {}
    for path in sorted(folder.glob("*_i18n_Translation-en*")):
        for fields in stanzas(path):
            texts.setdefault(fields["Description-md5"], unfold(fields["Description-en"]))
    found: dict[str, Package] = {}
    for path in sorted(folder.glob("*_Packages*")):
        for fields in stanzas(path):
            synopsis, text = texts.get(fields.get("Description-md5", ""), ("", ""))
            name = fields["Package"]
            if text and synopsis and name not in found:
                found[name] = Package(
                    package=name,
                    source=fields.get("Source", name).split(" ")[0],
                    section=fields["Section"].rpartition("/")[2],
                    maintainer=fields.get("Maintainer", ""),
                    synopsis=synopsis,
                    description=text,
                )
    return [found[name] for name in sorted(found)]


def split_of(source: str) -> str:
    """`test` (10 %), `validation` (2 %) or `train`, by a hash of the source package's name.

    All binary packages of a source fall into the same split.
    """
    bucket = int(hashlib.sha256(source.encode()).hexdigest()[:8], 16) % 100
    return "test" if bucket < 10 else "validation" if bucket < 12 else "train"


def answer(instruction: str, section: str, synopsis: str) -> str:
    if instruction == SECTION:
        return section
    if instruction == SYNOPSIS:
        return synopsis
    return json.dumps({"section": section, "synopsis": synopsis}, ensure_ascii=False)


def join_binaries(packages: list[Package]) -> list[Package]:
    """One long pseudo-package per source with several binaries, with joined descriptions and the main one's answers."""
    by_source: dict[str, list[Package]] = {}
    for p in packages:
        by_source.setdefault(p.source, []).append(p)
    out = []
    for source, members in sorted(by_source.items()):
        main = next((p for p in members if p.package == source), members[0])
        text = "\n\n".join(p.description for p in members)
        if len(members) > 1 and 2_000 <= len(text) <= 12_000:
            out.append(Package(source, source, main.section, main.maintainer, main.synopsis, text))
    return out


WORD = re.compile(r"[A-Za-z][A-Za-z0-9+.-]{3,}")
