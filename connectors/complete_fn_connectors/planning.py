"""Whether a function is called to run a query or only to plan it.

DuckDB evaluates a call whose arguments are all constant while it plans: EXPLAIN and PREPARE would pay for an answer.
At most of these places it takes an exception as a sign to keep the call and evaluate it when the query runs. Nothing
in the arguments tells the two apart, but the native call stack does: all these places go through one function that
catches the exception. Once per process a probe that raises is planned on a database of our own, and the return
addresses that all its caught calls share, and no other call has, are noted. Where DuckDB does not catch (LIMIT, VALUES,
CASE and OR on a constant, patterns, arguments of table functions), and on platforms whose C library has no `backtrace`
(Windows, musl), a constant call is answered while planning, as by any other function.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
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
    "SELECT i FROM probed WHERE probe('x') = 'x' AND i > 2",
    "SELECT i FROM probed WHERE p = probe('x') OR i < length(probe('x'))",
    "SELECT i FROM range(3) t(i) ORDER BY probe('x')",
    "SELECT max(probe('x') || i) FROM range(3) t(i) GROUP BY probe('x')",
    "SELECT p FROM (SELECT 'a' || i p FROM range(3) t(i)) WHERE p = probe('x')",
    "SELECT coalesce(probe('x'), 'y'), probe('x') || 'z', upper(probe('x')), probe('x') = 'y'",
    "SELECT CASE WHEN i > length(probe('x')) THEN probe('x') ELSE probe('y')::VARCHAR END FROM range(3) t(i)",
    "SELECT CASE WHEN probe('x') = 'y' THEN 1 END",
)
NEEDED = ("SELECT * FROM range(length(upper(probe('x'))))", "SELECT 1 LIMIT length(probe('x') || 'z')")


@dataclass(frozen=True)
class Places:
    """Return addresses: of running a plan, and of where planning tries a constant and catches its exception."""

    executor: frozenset[int] = frozenset()
    optional: frozenset[int] = frozenset()


class Probe:
    """A function that raises at its first `refusals` calls in a query and remembers from where it was called."""

    def __init__(self) -> None:
        self.refusals = 0
        self.stacks: list[list[int]] = []

    def __call__(self, texts: Any) -> Any:
        self.stacks.append(native_stack())
        if len(self.stacks) <= self.refusals:
            raise ValueError("not while planning")
        return pa.array(["x"] * len(texts), pa.string())

    def called_from(self, con: duckdb.DuckDBPyConnection, query: str, refusals: int) -> tuple[list[list[int]], bool]:
        """The stacks of all calls that `query` makes, and whether DuckDB could do without the refused ones."""
        self.refusals, self.stacks = refusals, []
        try:
            con.execute(query).fetchall()
        except duckdb.Error:
            return self.stacks, False
        return self.stacks, True


def native_stack() -> list[int]:
    """Return addresses of this thread's native stack, innermost first; empty where the platform has no backtrace."""
    try:
        backtrace = ctypes.CDLL(None).backtrace
    except (AttributeError, OSError, TypeError):
        return []
    frames = (ctypes.c_void_p * DEPTH)()
    return [a for a in frames[: backtrace(frames, DEPTH)] if a is not None]


@cache
def places() -> Places:
    """Found by planning the queries of PLANNED, then running them. Call it outside of functions that DuckDB calls."""
    probe = Probe()
    folded: list[list[int]] = []
    needed: list[list[int]] = []
    run: list[list[int]] = []
    with duckdb.connect() as con:
        con.create_function("probe", probe, ["VARCHAR"], "VARCHAR", type=ARROW)
        con.execute("CREATE TABLE probed AS SELECT i, 'a' || i AS p FROM range(3) r(i)")
        for query in PLANNED:
            stacks, went_on = probe.called_from(con, f"EXPLAIN {query}", refusals=1_000)
            folded += stacks if went_on else stacks[:-1]
            needed += [] if went_on else stacks[-1:]
            run += probe.called_from(con, query, refusals=len(stacks))[0][len(stacks) :] if went_on else []
        evaluated = [stack for query in NEEDED for stack in probe.called_from(con, query, refusals=0)[0]]
        con.remove_function("probe")
    if not run or not all(folded):
        return Places()
    optional = set.intersection(*map(set, folded)).difference(*needed, *run)
    executor = set.intersection(*map(set, run)).difference(*folded, *needed, *evaluated)
    return Places(frozenset(executor), frozenset(optional))


def at_plan_time() -> bool:
    """Whether DuckDB calls to fold a constant that it can do without. For calls of one row: folding makes no other."""
    known = places()
    if not known.executor or not known.optional:
        return False
    stack = native_stack()
    return known.executor.isdisjoint(stack) and not known.optional.isdisjoint(stack)
