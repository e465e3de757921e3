"""A stranger's query runs in a child process, whose memory and life are bounded whatever the query makes a driver do.

DuckDB computes a constant such as `repeat('x', 2000000000)` outside of its own memory limit, a driver holds a row of
gigabytes before anybody can look at it, and one call of a function in SQLite cannot be interrupted. The child
(`python -m complete_fn.rows.query_process`) reads its task as a line of JSON from stdin and writes the rows to stdout
as an Arrow IPC stream. When stdin ends, it cancels its query. Its reason to fail is its last line on stderr.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import pyarrow as pa

from complete_fn.errors import CompleteError, DatabaseAwayError, InputError
from complete_fn.interrupts import GONE, Abandoned, abandonable, end_if_abandoned
from complete_fn.rows.databases import Query, open_database

MEMORY_BYTES = 2 * 1024**3  # of the child; it needs some 300 MB itself
BATCH_BYTES = 64 * 1024**2  # of the rows that it hands over at a time, and so of the longest row
LOOK_SECONDS = 0.25  # between two looks whether the child must end
GRACE_SECONDS = 2.0  # for the child to cancel its query, before it is killed
BACKSTOP_SECONDS = 15.0  # after the limit, at which the child cancels the query itself
REFUSED, AWAY = 3, 4  # exit codes: the database refuses the query, or does not answer
TOO_MUCH = "The query needs more than the {0:,} MiB of memory that it may take."
TOO_LONG_A_ROW = "The query has a row of more than {0:,} MiB."
FAILED = "The query's process ended without a reason ({0}). It may have needed more memory than there is."


class QueryProcess:
    """The rows of one database for strangers' queries: a `databases.RowReader`.

    Args:
        url: as `databases.open_database` takes it. Only the child's stdin gets it.
        seconds: what a query may take.
    """

    def __init__(self, url: str, seconds: float) -> None:
        self.url, self.seconds = url, seconds

    def batches(self, query: Query) -> Iterator[Any]:
        """Record batches of one schema, streamed; at least one, which may be empty.

        Raises:
            InputError: The database refuses the query, or the query exceeds its limits.
            DatabaseAwayError: The database does not answer.
        """
        task = {"url": self.url, "seconds": self.seconds, "query": asdict(query)}
        with tempfile.TemporaryFile() as reasons:
            child = subprocess.Popen(
                [sys.executable, "-P", "-m", "complete_fn.rows.query_process"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=reasons,
                start_new_session=True,  # Ctrl-C is for this process, which then ends the child
            )
            assert child.stdin is not None
            assert child.stdout is not None
            ended, given = threading.Event(), (self.seconds + BACKSTOP_SECONDS, GONE.get())
            threading.Thread(target=end_late, args=(child, ended, *given), name="query backstop", daemon=True).start()
            try:
                try:
                    child.stdin.write(json.dumps(task, default=str).encode() + b"\n")
                    child.stdin.flush()
                    with pa.ipc.open_stream(child.stdout) as stream:
                        yield from stream
                except (OSError, pa.ArrowException):  # a child that fails ends its stream in the middle
                    pass
                code = child.wait()
                end_if_abandoned()
                if code != 0:
                    raise (DatabaseAwayError if code == AWAY else InputError)(reason(reasons, code))
            finally:
                ended.set()
                child.stdout.close()
                end_child(child)


def end_late(
    child: subprocess.Popen[bytes], ended: threading.Event, seconds: float, gone: threading.Event | None
) -> None:
    """End the child after so many seconds, or when nobody waits for its rows any more, unless it has `ended` before."""
    until = time.monotonic() + seconds
    while not ended.wait(LOOK_SECONDS):
        if time.monotonic() >= until or (gone is not None and gone.is_set()):
            end_child(child)
            return


def end_child(child: subprocess.Popen[bytes]) -> None:
    """End the child's stdin, at which it cancels its query. A server would otherwise go on with it for nobody."""
    assert child.stdin is not None
    with suppress(OSError):
        child.stdin.close()
    try:
        child.wait(GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def reason(reasons: Any, code: int) -> str:
    reasons.seek(0)
    lines = reasons.read().decode("utf-8", "replace").splitlines()
    try:
        return str(json.loads(lines[-1])["reason"])
    except (IndexError, ValueError, TypeError, KeyError):
        return FAILED.format(f"exit code {code}")


def main() -> int:
    task = json.loads(sys.stdin.readline())
    limit_memory()
    gone = threading.Event()
    threading.Thread(target=watch_parent, args=(gone,), daemon=True).start()
    with abandonable(gone):
        return send_rows(task)


def watch_parent(gone: threading.Event) -> None:
    """Set the event when the parent ends our stdin: it wants no more rows, or it was killed."""
    with suppress(OSError):
        os.read(0, 1)
    gone.set()


def send_rows(task: dict[str, Any]) -> int:
    """Run the query and write its rows to stdout; returns the exit code."""
    out = sys.stdout.buffer
    try:
        database = open_database(task["url"], read_only=True, seconds=task["seconds"])
        batches = iter(database.batches(Query(**task["query"])))
        first = next(batches)
        with pa.ipc.new_stream(out, first.schema) as stream:
            for batch in itertools.chain([first], batches):
                for piece in pieces(batch):
                    stream.write_batch(piece)
    except (MemoryError, pa.ArrowMemoryError):
        return fail(TOO_MUCH.format(MEMORY_BYTES // 1024**2))
    except (BrokenPipeError, Abandoned):  # nobody reads the rows any more
        return 1
    except CompleteError as error:
        return fail(str(error), AWAY if isinstance(error, DatabaseAwayError) else REFUSED)
    return 0


def limit_memory() -> None:
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))


def pieces(batch: Any) -> Iterator[Any]:
    """The batch in pieces of at most `BATCH_BYTES`."""
    if batch.nbytes <= BATCH_BYTES:
        yield batch
    elif batch.num_rows <= 1:
        raise InputError(TOO_LONG_A_ROW.format(BATCH_BYTES // 1024**2))
    else:
        half = batch.num_rows // 2
        yield from pieces(batch.slice(0, half))
        yield from pieces(batch.slice(half))


def fail(why: str, code: int = REFUSED) -> int:
    print(json.dumps({"reason": why}), file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
