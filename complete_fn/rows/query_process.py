"""A stranger's query runs in a child process, whose memory and life are bounded whatever the query makes a driver do.

DuckDB computes a constant such as `repeat('x', 2000000000)` outside of its own memory limit, a driver holds a row of
gigabytes before anybody can look at it, and one call of a function in SQLite cannot be interrupted. The child
(`python -m complete_fn.rows.query_process`) reads its task as JSON from stdin and writes the rows to stdout as an Arrow
IPC stream. Its reason to fail is its last line on stderr.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import pyarrow as pa

from complete_fn.errors import CompleteError, InputError
from complete_fn.rows.databases import Query, open_database

MEMORY_BYTES = 2 * 1024**3  # of the child; it needs some 300 MB itself
BATCH_BYTES = 64 * 1024**2  # of the rows that it hands over at a time, and so of the longest row
BACKSTOP_SECONDS = 15.0  # after the limit, at which the child cancels the query itself
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
        """
        task = {"url": self.url, "seconds": self.seconds, "query": asdict(query)}
        with tempfile.TemporaryFile() as reasons:
            child = subprocess.Popen(
                [sys.executable, "-P", "-m", "complete_fn.rows.query_process"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=reasons,
                start_new_session=True,  # Ctrl-C is for this process, which then kills the child
            )
            assert child.stdin is not None
            assert child.stdout is not None
            backstop = threading.Timer(self.seconds + BACKSTOP_SECONDS, child.kill)
            backstop.daemon = True
            backstop.start()
            try:
                try:
                    with child.stdin:
                        child.stdin.write(json.dumps(task, default=str).encode())
                    with pa.ipc.open_stream(child.stdout) as stream:
                        yield from stream
                except (OSError, pa.ArrowException):  # a child that fails ends its stream in the middle
                    pass
                if child.wait() != 0:
                    raise InputError(reason(reasons, child.returncode))
            finally:
                backstop.cancel()
                child.kill()
                child.wait()
                child.stdout.close()


def reason(reasons: Any, code: int) -> str:
    reasons.seek(0)
    lines = reasons.read().decode("utf-8", "replace").splitlines()
    try:
        return str(json.loads(lines[-1])["reason"])
    except (IndexError, ValueError, TypeError, KeyError):
        return FAILED.format(f"exit code {code}")


def main() -> int:
    task = json.load(sys.stdin)
    limit_memory()
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
    except BrokenPipeError:  # nobody reads the rows any more
        return 1
    except CompleteError as error:
        return fail(str(error))
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


def fail(why: str) -> int:
    print(json.dumps({"reason": why}), file=sys.stderr, flush=True)
    return 3


if __name__ == "__main__":
    sys.exit(main())
