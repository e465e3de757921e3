"""A reader of a page: runs its blocks in order, each as what it is, and keeps what one leaves for the next.

Reads a JSON list of [kind, code] from stdin and writes one of what each block printed into the file given. Python and,
where there is a `con`, SQL run in this process; the shell's variables are kept from block to block, for Python too;
other SQL goes to psql and the database that DOCS_DATABASE names. [file, name, content] is a file that the page shows.
"""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import traceback
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any

SERVICES = Path("services.pids")  # what the shell has started in the background
VARIABLES = Path("variables.env")


def run_python(code: str, names: dict[str, Any]) -> None:
    exec(compile(code, "<page>", "exec"), names)  # noqa: S102  the page's own code


def run_sql(code: str, names: dict[str, Any]) -> None:
    if "con" not in names:
        command = ["psql", "-X", "-v", "ON_ERROR_STOP=1", "-d", os.environ["DOCS_DATABASE"]]
        print(subprocess.run(command, input=code, stdout=subprocess.PIPE, text=True, check=True).stdout)
        return
    for statement in names["con"].extract_statements(code):
        rows = names["con"].sql(statement.query)
        if rows is not None:
            rows.show(max_width=200)


def run_shell(code: str, _: dict[str, Any]) -> None:
    script = f"set -euo pipefail\n{code}\nenv -0 > {VARIABLES}"
    done = subprocess.run(
        ["bash", "-c", script], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, check=True
    )
    print(done.stdout)
    pairs = [pair.partition("=") for pair in VARIABLES.read_text().split("\0") if pair]
    os.environ.update({name: value for name, _, value in pairs if name not in ("_", "SHLVL", "PWD", "OLDPWD")})


RUN = {"python": run_python, "sql": run_sql, "sh": run_shell}


def main() -> int:
    names: dict[str, Any] = {"__name__": "__main__"}
    printed = []
    for number, (kind, *block) in enumerate(json.load(sys.stdin), 1):
        if kind == "file":
            Path(block[0]).write_text(block[1])
            continue
        out = io.StringIO()
        try:
            with redirect_stdout(out):
                RUN[kind](block[0], names)
        except Exception:
            traceback.print_exc()
            print(f"Block {number} ({kind}) failed:\n{block[0]}\n{out.getvalue()}", file=sys.stderr)
            return 1
        finally:
            printed.append(out.getvalue())
    Path(sys.argv[1]).write_text(json.dumps(printed))
    return 0


def end_services() -> None:
    for pid in SERVICES.read_text().split() if SERVICES.exists() else ():
        with suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGTERM)


if __name__ == "__main__":
    try:
        code = main()
    finally:
        end_services()
    sys.exit(code)
