"""What the site generator's strict mode does not see: broken images, raw HTML links, and anything fetched elsewhere."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

FETCHED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}
LINKED = {"a": "href", "img": "src", "script": "src", "link": "href"}


@dataclass
class Page(HTMLParser):
    """A page's anchors and links."""

    ids: set[str] = field(default_factory=set)
    links: list[tuple[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.ids |= {value for name in ("id", "name") if (value := given.get(name))}
        if tag in LINKED and (target := given.get(LINKED[tag])):
            self.links.append((tag, target))


def read(path: Path) -> Page:
    page = Page()
    page.feed(path.read_text("utf-8"))
    return page


def faults(site: Path) -> list[str]:
    """One line for each link of a built site that leads nowhere, and for each thing that another host would serve."""
    pages = {path: read(path) for path in site.rglob("*.html")}
    found = []
    for path, page in sorted(pages.items()):
        for tag, target in page.links:
            why = fault(site, path, pages, tag, target)
            if why:
                found.append(f"{path.relative_to(site)}: <{tag}> {target}: {why}")
    return found


def fault(site: Path, path: Path, pages: dict[Path, Page], tag: str, target: str) -> str | None:
    url = urlsplit(target)
    if url.scheme or url.netloc:
        is_fetched = tag in FETCHED and url.scheme in ("", "http", "https")
        return "it would be fetched from another host" if is_fetched else None
    base = site if url.path.startswith("/") else path.parent  # 404.html links from the root
    aim = (base / unquote(url.path).lstrip("/")).resolve() if url.path else path
    aim = aim / "index.html" if aim.is_dir() else aim
    if not aim.is_file():
        return "there is no such file"
    if url.fragment and aim in pages and unquote(url.fragment) not in pages[aim].ids:
        return "there is no such anchor"
    return None
