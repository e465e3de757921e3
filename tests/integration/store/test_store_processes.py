"""Several real processes on one state."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import sqlalchemy as sa

from complete_fn.errors import StoreBusyError
from complete_fn.store.store import Store
from complete_fn.store.tables import answers, attempts, ledger

WRITER = """
import sys, time
from pathlib import Path
from complete_fn.store.attempts import StoredAnswer
from complete_fn.store.records import LedgerLine
from complete_fn.store.store import Store
from complete_fn.types import Asker, Completion, Usage
path, worker, start = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
while time.time() < start:
    pass
store = Store(path)
attempt = store.begin(Asker(), "m", "USD", "example")
for n in range(30):
    store.admit(attempt, 1, 5)
    key = (worker * 1000 + n).to_bytes(32, "big")
    answer = StoredAnswer(key, Completion("x", usage=Usage(5, 0, 1)))
    store.commit(attempt, [answer], [LedgerLine("input", 1, 5, 5)], 1, 5)
store.finish(attempt, "done")
"""

HOLDER = """
import sys
from pathlib import Path
from complete_fn.store.store import Store
with Store(Path(sys.argv[1])).write():
    print("held", flush=True)
    sys.stdin.read()
"""

DYING = """
import os, signal, sys
from pathlib import Path
from complete_fn.store.store import Store
from complete_fn.types import Asker
store = Store(Path(sys.argv[1]))
store.admit(store.begin(Asker(job="j"), "m", "USD", "example"), 9, 90)
os.kill(os.getpid(), signal.SIGKILL)
"""


def start(script: str, *arguments: object) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def count(store: Store, table: sa.Table) -> int:
    with store.read() as connection:
        return int(connection.execute(sa.select(sa.func.count()).select_from(table)).scalar_one())


@pytest.mark.parametrize("attempt", range(2))
def test_processes_that_open_a_new_state_at_once(tmp_path: Path, attempt: int) -> None:
    import time

    path = tmp_path / "home" / "s"
    writers = [start(WRITER, path, n, time.time() + 2) for n in range(4)]
    for writer in writers:
        _, errors = writer.communicate(timeout=120)
        assert (writer.returncode, errors.decode()) == (0, "")
    store = Store(path)
    assert count(store, answers) == count(store, ledger) == 120
    assert count(store, attempts) == 4


def test_a_process_that_holds_the_state_too_long_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("complete_fn.store.sqlite_backend.BUSY_SECONDS", 0.3)
    Store(tmp_path / "s").close()
    holder = start(HOLDER, tmp_path / "s")
    assert holder.stdout is not None
    holder.stdout.readline()
    try:
        with pytest.raises(StoreBusyError, match="Another process holds"):
            Store(tmp_path / "s")
    finally:
        holder.communicate(timeout=30)
    Store(tmp_path / "s").close()


def test_the_next_process_finds_what_a_killed_one_lost(tmp_path: Path) -> None:
    dying = start(DYING, tmp_path / "s")
    dying.communicate(timeout=60)
    assert dying.returncode == -9
    store = Store(tmp_path / "s")
    with store.read() as connection:
        (line,) = connection.execute(sa.select(ledger)).mappings().all()
        status = connection.execute(sa.select(attempts.c.status)).scalar_one()
    assert (line["price_class"], line["rows"], line["tokens"], line["cost_nano"]) == ("lost", 9, 90, 0)
    assert status == "lost"
