"""Code blocks of Markdown files, and what runs them: shared by the tests of the README and of the documentation."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from deploy.servers import binary

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^```(\w+)(?: title=\"([^\"]*)\")?\n(.*?)^```\n(?:\n^```text\n(.*?)^```\n)?", re.M | re.S)
RUNNING = ("python", "sql", "sh")  # kinds of blocks that are run
WORD = re.compile(r"[\w.+-]+")
LINES = re.compile(r"(?:[^\n\\]|\\.|\\\n)+")
# Set-up that the environment of the tests has already.
SET_UP = re.compile(r"^(pip install|complete-fn setup-engine\b)")
SERVE = "complete-fn serve"
WAIT = "curl -sf --retry 60 --retry-connrefused --retry-delay 1 --retry-max-time 120"


@dataclass(frozen=True)
class Block:
    """A fenced block. `shown` is the text block behind it: what it prints."""

    kind: str
    title: str
    code: str
    shown: str

    @property
    def commands(self) -> Iterator[str]:
        """Lines of a shell block, continued ones as one, without comments."""
        for line in LINES.findall(self.code):
            plain = re.sub(r"(^|\s)#.*", "", line).strip()
            if plain:
                yield plain


def blocks_of(text: str) -> list[Block]:
    return [Block(*found) for found in FENCE.findall(text)]


def alike(shown: str, real: str) -> float:
    """The share of the shown words that the real output has too: bf16 answers may differ in a word on another CPU."""
    wanted, found = WORD.findall(shown), set(WORD.findall(real))
    return sum(w in found for w in wanted) / len(wanted)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


def environment(home: Path, **more: str) -> dict[str, str]:
    """What a reader has: commands of this Python and psql on the path, a state folder, nothing of ours beside."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("COMPLETE_FN_")}
    path = f"{Path(sys.executable).parent}:{Path(binary('psql')).parent}:{os.environ['PATH']}"
    return {**kept, "COMPLETE_FN_HOME": str(home), "PATH": path, **more}


def read_page(
    blocks: Sequence[Block], folder: Path, given: Mapping[str, str], changes: Mapping[str, str] | None = None
) -> list[str]:
    """What each `python`, `sql` and `sh` block of a page prints, run in order in one process, in a folder of its own.

    A line `complete-fn serve` becomes a service in the background, on a port of its own.

    Args:
        given: the environment.
        changes: texts of the page that stand for what only a test knows, an address say.
    """
    port = free_port()
    replaced = {"127.0.0.1:8000": f"127.0.0.1:{port}", **(changes or {})}
    serve = (
        f"{SERVE} --port {port} > service.log 2>&1 & echo $! >> services.pids\n{WAIT} http://127.0.0.1:{port}/readyz"
    )
    steps: list[list[str]] = []
    for block in blocks:
        code = block.code
        for old, new in replaced.items():
            code = code.replace(old, new)
        if block.kind == "sh":
            lines = [":" if SET_UP.match(line) else line for line in LINES.findall(code)]
            code = "\n".join(serve if line.partition(" #")[0].strip() == SERVE else line for line in lines)
        if block.kind == "toml" and block.title:
            steps.append(["file", block.title, code])
        elif block.kind in RUNNING:
            steps.append([block.kind, code])
    (folder / "sql").symlink_to(ROOT / "sql")
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("doc_reader.py")), "printed.json"],
        input=json.dumps(steps),
        cwd=folder,
        env=dict(given),
        capture_output=True,
        text=True,
        check=False,
    )
    log = folder / "service.log"
    assert done.returncode == 0, done.stderr[-5000:] + (log.read_text()[-2000:] if log.exists() else "")
    printed: list[str] = json.loads((folder / "printed.json").read_text())
    return printed
