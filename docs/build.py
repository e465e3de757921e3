"""`make docs`: stage the pages, write the reference pages from the code, build the site strictly, check it.

Everything happens in one folder (default .cache/docs): `pages/` is what the site is built from, `site/` is the site.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docs import reference
from docs.site_check import faults

HERE = Path(__file__).parent
ROOT = HERE.parent
FIGURES = ("benchmarks/waterfall.png",)
DESCRIPTION = re.compile(r"\A---\ndescription: \"?(.*?)\"?\n---\n")


class DocsError(Exception):
    """The documentation cannot be built as it is."""


def stage(pages: Path) -> None:
    """The written pages, the generated ones, the figures and llms.txt in one folder."""
    shutil.copytree(HERE / "pages", pages)
    for figure in FIGURES:
        shutil.copy(ROOT / figure, pages / Path(figure).name)
    for path, content in reference.pages().items():
        (pages / path).parent.mkdir(exist_ok=True)
        (pages / path).write_text(content, "utf-8")
    (pages / "llms.txt").write_text(llms(pages), "utf-8")


def navigation() -> dict[str, Any]:
    with (HERE / "zensical.toml").open("rb") as file:
        project: dict[str, Any] = tomllib.load(file)["project"]
    return project


def entries(nav: list[dict[str, Any]], section: str = "") -> Iterator[tuple[str, str, str]]:
    """(section, title, path) of every page of the navigation."""
    for entry in nav:
        for title, target in entry.items():
            if isinstance(target, str):
                yield section, title, target
            else:
                yield from entries(target, title)


def llms(pages: Path) -> str:
    """llms.txt: what the site has, with links to the pages' Markdown. https://llmstxt.org

    Raises:
        DocsError: the navigation lacks a page, or a page says nothing about itself.
    """
    project = navigation()
    listed = list(entries(project["nav"]))
    there = {str(path.relative_to(pages)) for path in pages.rglob("*.md")}
    if stray := there ^ {path for _, _, path in listed}:
        raise DocsError(f"zensical.toml's nav and the pages differ: {', '.join(sorted(stray))}.")
    lines, last = [f"# {project['site_name']}", "", f"> {project['site_description']}"], None
    for section, title, path in listed:
        found = DESCRIPTION.match((pages / path).read_text("utf-8"))
        if found is None:
            raise DocsError(f"{path} does not begin with a description: '---', 'description: ...', '---'.")
        if section != last:
            lines += ["", f"## {section or 'Start'}", ""]
            last = section
        lines.append(f"- [{title}]({path}): {found[1]}")
    return "\n".join(lines) + "\n"


def build(folder: Path = ROOT / ".cache" / "docs") -> Path:
    """The folder of the site.

    Raises:
        DocsError: a link or an anchor leads nowhere, a page is not in the navigation, or something would be fetched
            from another host.
    """
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    stage(folder / "pages")
    shutil.copy(HERE / "zensical.toml", folder)
    shutil.copytree(HERE / "theme", folder / "theme")
    command = [sys.executable, "-m", "zensical", "build", "--strict", "-f", str(folder / "zensical.toml")]
    done = subprocess.run(command, cwd=folder, env={**os.environ, "NO_COLOR": "1"}, capture_output=True, text=True)
    if done.returncode != 0:
        raise DocsError(done.stdout + done.stderr)
    site = folder / "site"
    for page in (folder / "pages").rglob("*.md"):
        shutil.copy(page, site / page.relative_to(folder / "pages"))
    if found := faults(site):
        raise DocsError("\n".join(found))
    return site


if __name__ == "__main__":
    try:
        print(f"The documentation is in {build()}/index.html.")
    except DocsError as error:
        sys.exit(str(error))
