"""Whole processes: Ctrl-C in a running query, on the main thread and on DuckDB's own, and a quiet exit."""

from __future__ import annotations

import re
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

# A process that hangs prints what its threads do and ends, so that the test that waits for it fails instead of hanging.
SLOW = """
import faulthandler, sys, threading, time, warnings, duckdb
faulthandler.dump_traceback_later(100, exit=True)
from complete_fn import Completion, EchoEngine, Usage
from complete_fn_connectors.duckdb import register

class Slow:
    "50 rows a second; `stuck` blocks for a minute."
    def stream(self, requests, tenant):
        for position, request in enumerate(requests):
            time.sleep(60 if request.prompt == "stuck" else 0.02)
            if position == 20:
                print("running", flush=True)
            yield position, Completion(request.prompt, "stop", usage=Usage(2, 0, 2))
    def count_tokens(self, texts):
        return [len(t) for t in texts]
    def close(self):
        pass

home = sys.argv[1]
"""

RUN = """
print("ready", flush=True)
try:
    run()
    print("ran to its end")
except BaseException as raised:
    print("raised", type(raised).__name__, str(raised).replace("\\n", " "), flush=True)
print(con.execute("SELECT 42").fetchall())
"""


def interrupted(script: str, home: Path, after: str = "running") -> tuple[str, str, float]:
    """stdout, stderr and the seconds from Ctrl-C, sent once `after` has been printed, to the error the query raised."""
    command = [sys.executable, "-c", script, str(home)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        seen = ""
        while after not in seen:
            line = process.stdout.readline()
            assert line, seen + process.stderr.read()
            seen += line
        process.send_signal(signal.SIGINT)
        sent = time.monotonic()
        while line and "raised" not in line:
            line = process.stdout.readline()
            seen += line
        seconds = time.monotonic() - sent
        out, err = seen + process.stdout.read(), process.stderr.read()
    assert "Timeout (" not in err, err
    return out, err, seconds


def kept(home: Path) -> tuple[int, set[str]]:
    with sqlite3.connect(home / "state.sqlite3") as state:
        answers = state.execute("SELECT count(*) FROM answers").fetchone()[0]
        return answers, {status for (status,) in state.execute("SELECT status FROM attempts")}


ENDED = r"raised .*(KeyboardInterrupt|Query interrupted)"  # DuckDB's own error, where it was faster than ours
DUCKDB = SLOW + "con = duckdb.connect()\nregister(con, engine=Slow(), home=home)\n"
MANY = "con.execute(\"CREATE TABLE docs AS SELECT 'doc ' || i AS text FROM range({rows}) r(i)\")\n"


@pytest.mark.parametrize("threads", [1, 4])
def test_ctrl_c_ends_a_query_within_two_seconds_and_keeps_finished_rows(threads: int, tmp_path: Path) -> None:
    script = DUCKDB + MANY.format(rows=500_000) + f"con.execute('SET threads = {threads}')\n"
    script += "run = lambda: con.execute(\"SELECT count(complete('m', text)) FROM docs\").fetchall()\n" + RUN
    out, err, seconds = interrupted(script, tmp_path)
    assert seconds < 2
    assert re.search(ENDED, out)
    assert "[(42,)]" in out  # the connection lives on
    answers, statuses = kept(tmp_path)
    assert answers >= 20
    assert statuses == {"cancelled"}
    assert err == ""


def test_ctrl_c_gets_through_an_engine_that_is_stuck(tmp_path: Path) -> None:
    script = DUCKDB + "run = lambda: con.execute(\"SELECT complete('m', 'stuck')\").fetchall()\n"
    script += RUN.replace('"ready"', '"going"')
    script = script.replace("run()\n", "threading.Timer(1, lambda: print('stuck now', flush=True)).start(); run()\n")
    out, _, seconds = interrupted(script, tmp_path, "stuck now")
    assert re.search(ENDED, out)
    assert seconds < 2


def test_ctrl_c_reaches_queries_of_other_threads(tmp_path: Path) -> None:
    script = DUCKDB + MANY.format(rows=2000)
    script += """
def query():
    try:
        con.cursor().execute("SELECT count(complete('m', text)) FROM docs").fetchall()
    except duckdb.Error as error:
        print("query:", str(error).replace("\\n", " "), flush=True)
    ended.set()
ended = threading.Event()
def run():
    threading.Thread(target=query).start()
    try:
        ended.wait()
    finally:
        ended.wait()
"""
    out, err, seconds = interrupted(script + RUN, tmp_path)
    assert "the query was interrupted; finished rows are kept" in out
    assert "raised KeyboardInterrupt" in out
    assert seconds < 2
    assert kept(tmp_path)[0] >= 20
    assert err == ""


POLARS = (
    SLOW
    + """
import polars as pl
from complete_fn_connectors.polars import complete, configure
configure(engine=Slow(), home=home)
con = duckdb.connect()
df = pl.DataFrame({"text": [f"doc {i}" for i in range(3000)]})
"""
)


@pytest.mark.parametrize(
    "query",
    [
        "df.select(complete('m', 'text'))",
        "df.select(complete('m', 'text'), twice=complete('m', pl.col('text') + '!'))",
        "df.lazy().select(complete('m', 'text')).collect(engine='streaming')",
    ],
)
def test_ctrl_c_ends_a_polars_query_too(query: str, tmp_path: Path) -> None:
    out, err, seconds = interrupted(POLARS + f"run = lambda: {query}\n" + RUN, tmp_path)
    assert "KeyboardInterrupt" in out + err  # the streaming engine may raise a second one where the first is caught
    assert "ran to its end" not in out
    assert seconds < 2
    assert kept(tmp_path)[0] >= 20


FORK = """
import os, signal
from complete_fn.interrupts import INTERRUPTS
signal.signal(signal.SIGINT, lambda *_: None)
INTERRUPTS.listen()
if (child := os.fork()) == 0:
    os.kill(os.getpid(), signal.SIGINT)
    forgotten = INTERRUPTS.count()
    INTERRUPTS.listen()
    os.kill(os.getpid(), signal.SIGINT)
    os._exit(10 * forgotten + INTERRUPTS.count())
_, status = os.waitpid(child, 0)
print(os.waitstatus_to_exitcode(status), INTERRUPTS.count())
os.kill(os.getpid(), signal.SIGINT)
print(INTERRUPTS.count())
"""


def test_a_forked_child_has_interrupts_of_its_own() -> None:
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["1", "0", "1"]


def test_another_librarys_wake_up_descriptor_is_left_alone() -> None:
    script = FORK[: FORK.index("if (child")].replace(
        "INTERRUPTS.listen()",
        "import socket\nmine, _ = socket.socketpair()\nmine.setblocking(False)\nsignal.set_wakeup_fd(mine.fileno())\n"
        "INTERRUPTS.listen()\nprint(signal.set_wakeup_fd(-1) == mine.fileno(), INTERRUPTS.count())",
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["True", "0"]


ENDINGS = {
    "a connection left open": "con.execute(\"SELECT complete('m', 'x' || i) FROM range(5) r(i)\").fetchall()",
    "a result left unread": "con.execute(\"SELECT complete('m', 'x' || i) FROM range(5) r(i)\")",
    "a relation left over": "r = con.sql(\"SELECT complete('m', 'x' || i) FROM range(5) r(i)\")",
    "a cursor left over": "c = con.cursor(); c.execute(\"SELECT complete('m', 'x')\").fetchall(); del con",
    "a closed connection": "con.close()",
    "a caught error": "\ntry: con.execute(\"SELECT complete('m', 1)\")\nexcept duckdb.Error: pass",
    "a thread's cursor": (
        "t = threading.Thread(target=lambda: con.cursor().execute(\"SELECT complete('m', 'y')\").fetchall()); "
        "t.start(); t.join()"
    ),
    "registered twice": "register(con, engine=EchoEngine(), home=home, cortex=True)",
    "the default connection": "register(duckdb.default_connection(), engine=EchoEngine(), home=home)",
    "sys.exit": "sys.exit(0)",
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_nothing_is_printed_at_exit(ending: str, tmp_path: Path) -> None:
    quiet = "con = duckdb.connect(); con.execute('SET enable_progress_bar = false')\n"  # DuckDB's own, after 2 s
    script = SLOW + quiet + "register(con, engine=EchoEngine(), home=home)\n" + ENDINGS[ending]
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_warning_names_the_users_own_line(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        SLOW.replace("sys.argv[1]", repr(str(tmp_path)))
        + "con = duckdb.connect()\ncon.execute('SET threads = 1')\n"
        + "register(con, engine=EchoEngine(context=2), home=home)\n"
        + "con.execute(\"SELECT complete('m', 'too many words ' || i) FROM range(3) r(i)\").fetchall()  # here\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60, check=True)
    first = r"script.py:\d+: CompletionWarning: Rows without an answer so far: 3 \(3 prompt_too_long\)"
    assert re.search(first, done.stderr)
    assert done.stderr.rstrip().endswith("# here")
