"""Whether a function is called to run a query or only to plan it.

DuckDB evaluates a call whose arguments are all constant while it plans: EXPLAIN and PREPARE would pay for an answer.
At most of these places it takes an exception as a sign to keep the call and evaluate it when the query runs. Nothing
in the arguments tells the two apart, but the native call stack does. Once per process a probe that always raises is
planned on a database of our own, and the innermost return address of each place where DuckDB went on is noted. Where
it does not go on (LIMIT, VALUES, CASE on a constant, arguments of table functions), and on platforms whose C library
has no `backtrace` (Windows, musl), a constant call is answered while planning, as by any other function.
"""

from __future__ import annotations

import contextlib
import ctypes
from functools import cache
from typing import Any

import duckdb
import pyarrow as pa
from duckdb.func import ARROW

DEPTH = 128  # frames; the addresses sought lie within the innermost 40

PLANNED = (
    "SELECT probe('x')",
    "SELECT 1 FROM range(3) t(i) WHERE probe('x') = 'y' AND i > 1",
    "SELECT 1 FROM range(3) t(i) WHERE length(probe('x')) > i",
    "SELECT 1 FROM range(3) t(i) WHERE i > 1 OR probe('x') IN ('y', 'z')",
    "SELECT i FROM range(3) t(i) ORDER BY probe('x')",
    "SELECT max(probe('x') || i) FROM range(3) t(i) GROUP BY probe('x')",
    "SELECT p FROM (SELECT 'a' || i p FROM range(3) t(i)) WHERE p = probe('x')",
    "SELECT coalesce(probe('x'), 'y'), probe('x') || 'z', upper(probe('x')), probe('x') = 'y'",
    "SELECT CASE WHEN probe('x') = 'y' THEN 1 END",
)
RUN = (
    "SELECT probe('x' || i) = 'y', upper(probe('x' || i)) || 'z' FROM range(1) t(i)",
    "SELECT coalesce(probe('x' || i), 'z'), CASE WHEN probe('x' || i) = 'y' THEN 1 END FROM range(1) t(i)",
    "SELECT count(*) FROM range(1) t(i) WHERE probe('x' || i) = 'x' OR length(probe('y' || i)) > i",
    "SELECT * FROM range(length(probe('x')))",
    "SELECT * FROM range(length(upper(probe('x')) || 'z'))",
)


def native_stack() -> list[int]:
    """Return addresses of this thread's native stack, innermost first; empty where the platform has no backtrace."""
    try:
        backtrace = ctypes.CDLL(None).backtrace
    except (AttributeError, OSError, TypeError):
        return []
    frames = (ctypes.c_void_p * DEPTH)()
    return [a for a in frames[: backtrace(frames, DEPTH)] if a is not None]


@cache
def folding_addresses() -> frozenset[int]:
    """Return addresses that are on the stack only where DuckDB folds a constant and can go without.

    Call it before the first query, outside of any function that DuckDB calls.
    """
    seen: list[list[int]] = []
    refuse = False

    def probe(texts: Any) -> Any:
        seen.append(native_stack())
        if refuse:
            raise ValueError("not while planning")
        return pa.array(["x"] * len(texts), pa.string())

    with duckdb.connect() as con:
        con.create_function("probe", probe, ["VARCHAR"], "VARCHAR", type=ARROW)
        for query in RUN:
            con.execute(query).fetchall()
        running = {address for stack in seen for address in stack}
        refuse = True
        swallowed: set[int] = set()
        surfaced: set[int] = set()
        for query in PLANNED:
            seen.clear()
            last: set[int] = swallowed
            try:
                con.execute(f"EXPLAIN {query}").fetchall()
            except duckdb.Error:
                last = surfaced
            found = [next((a for a in stack if a not in running), 0) for stack in seen]
            swallowed.update(found[:-1])
            last.update(found[-1:])
        with contextlib.suppress(duckdb.Error):
            con.remove_function("probe")
    return frozenset(swallowed - surfaced - {0})


def at_plan_time() -> bool:
    """Whether DuckDB calls to fold a constant that it can fold later. For calls of one row: folding makes no other."""
    addresses = folding_addresses()
    return bool(addresses) and not addresses.isdisjoint(native_stack())
