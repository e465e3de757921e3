"""Past runs give the estimate of the next run: device-seconds by class of token, and the lengths of answers.

Each run leaves one row in the table `runs`: its billed tokens and device-seconds, and the seconds from its first prompt
to its last answer, without the engine's start. The row has the same numbers for the run's steady part, while the engine
was full: filling and emptying the engine takes a larger share of a small run. If the engine does not meter its devices,
the time between two answers stands for device time.
"""

from __future__ import annotations

import hashlib
import math
import statistics
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np
import sqlalchemy as sa

from complete_fn.engines.call import Call
from complete_fn.errors import StoreError
from complete_fn.history.least_squares import Floats, nonnegative
from complete_fn.planning import BatchPlan
from complete_fn.prompts.fields import has_fields, unpack_fields
from complete_fn.store.store import Store
from complete_fn.store.tables import runs
from complete_fn.types import Usage

KEPT = 20_000  # runs in the table at most; bounds its size
PAST = 200  # latest runs of a model that an estimate reads
FEW = 20  # with fewer rows, past answers predict nothing
LEAST_ROWS = 8  # a run with fewer rows is not kept
# Assumed relative costs of an uncached prompt token, a cached prompt token, an output token, and a row. Half of the
# cached token's cost is attention of later tokens: in prompts of 400 tokens, an uncached token behind 200 cached tokens
# costs 1.15 times as much.
BEFORE = (1.0, 0.1, 8.0, 20.0)
ALONE = 0.2  # the quantile of clock time per device time that stands for a run with the engine to itself
TRUST = 0.0005  # weight of BEFORE relative to the largest past run


@dataclass(frozen=True, slots=True)
class Run:
    """One past run.

    Attributes:
        kind: see `kind_of`.
        usage: of all rows, with the device-seconds on `device`.
        squares: the sum of the squared numbers of output tokens.
        seconds: by the clock.
        steady: the usage of the `steady_rows` rows in the middle; nothing for a run too small to have a middle.
    """

    kind: bytes
    device: str
    rows: int
    usage: Usage
    squares: float
    seconds: float
    steady_rows: int = 0
    steady: Usage = Usage()

    @property
    def body(self) -> tuple[int, Usage]:
        """(rows, usage) from which rates are computed: the steady part, or else the whole run."""
        return (self.steady_rows, self.steady) if self.steady_rows else (self.rows, self.usage)


def amounts(usage: Usage, rows: int) -> tuple[int, int, int, int]:
    """(uncached prompt tokens, cached prompt tokens, output tokens, rows), the factors of `Rates.seconds`."""
    return usage.prompt_tokens - usage.cached_tokens, usage.cached_tokens, usage.completion_tokens, rows


@dataclass(frozen=True, slots=True)
class Rates:
    """Rates from past runs.

    Attributes:
        seconds: device-seconds per uncached prompt token, cached prompt token, output token and row.
        ends: device-seconds that a run takes in addition, while it fills and empties the engine.
        clock: seconds by the clock for one device-second, from the runs that shared the engine least.
        runs: the number of past runs.
    """

    seconds: tuple[float, float, float, float]
    ends: float
    clock: float
    device: str
    runs: int

    def of(self, usage: Usage, rows: int) -> float:
        """Device-seconds of a run with this usage; 0 without rows."""
        return float(np.dot(self.seconds, amounts(usage, rows))) + self.ends if rows else 0.0


@dataclass(frozen=True, slots=True)
class Lengths:
    """The number of output tokens of an answer, from `rows` past answers.

    Attributes:
        margin: half the 95 % interval of `mean`.
        same: whether the past answers are to the same instruction.
    """

    mean: float
    margin: float
    rows: int
    same: bool


def kind_of(call: Call, plan: BatchPlan) -> bytes:
    """A hash of model, options and instruction (the common beginning of all prompts, up to a white space)."""
    return hashlib.sha256(call.fingerprint + instruction(plan).encode("utf-8", "replace")).digest()


def instruction(plan: BatchPlan) -> str:
    if len(plan.first) < 2:
        return ""
    (_, (first,)), (_, (last,)) = (next(plan.texts(n, n + 1)) for n in (0, len(plan.first) - 1))
    if has_fields(first) and has_fields(last):
        return unpack_fields(first).instruction
    shared = next((n for n, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    words = first[: min(shared, 400)]
    return words[: max(words.rfind(" "), words.rfind("\n")) + 1]


def keep(store: Store, tenant: str, model: str, run: Run) -> None:
    """Note a run for later estimates. A store error is ignored, because the run's answers are already safe."""
    row = {
        "at": store.now(),
        "tenant": tenant,
        "model": model,
        "device": run.device,
        "kind": run.kind,
        "rows": run.rows,
        "prompt_tokens": run.usage.prompt_tokens,
        "cached_tokens": run.usage.cached_tokens,
        "completion_tokens": run.usage.completion_tokens,
        "squares": run.squares,
        "device_seconds": run.usage.device_seconds,
        "seconds": run.seconds,
        "steady_rows": run.steady_rows,
        "steady_prompt_tokens": run.steady.prompt_tokens,
        "steady_cached_tokens": run.steady.cached_tokens,
        "steady_completion_tokens": run.steady.completion_tokens,
        "steady_device_seconds": run.steady.device_seconds,
    }
    with suppress(StoreError), store.write() as connection:
        made = connection.execute(runs.insert().values(row).returning(runs.c.id)).scalar_one()
        connection.execute(runs.delete().where(runs.c.id <= made - KEPT))


def past(store: Store, model: str, tenant: str | None = None) -> list[Run]:
    """The latest runs of a model, newest first.

    Rates of this machine come from all tenants' runs, lengths of answers only from the tenant's own.
    """
    chosen = sa.select(runs).where(runs.c.model == model).order_by(runs.c.id.desc()).limit(PAST)
    if tenant is not None:
        chosen = chosen.where(runs.c.tenant == tenant)
    with store.read() as connection:
        rows = connection.execute(chosen).mappings().all()
    return [
        Run(
            bytes(r["kind"]),
            r["device"],
            r["rows"],
            usage_in(r, ""),
            r["squares"],
            r["seconds"],
            r["steady_rows"],
            usage_in(r, "steady_"),
        )
        for r in rows
    ]


def usage_in(row: sa.RowMapping, part: str) -> Usage:
    kinds = ("prompt_tokens", "cached_tokens", "completion_tokens", "device_seconds")
    return Usage(*(row[part + kind] for kind in kinds))


def lengths(found: Sequence[Run], kind: bytes) -> Lengths | None:
    """Lengths of past answers to the same instruction and options, or else of all the model's; None with too few."""
    for same, chosen in ((True, [r for r in found if r.kind == kind]), (False, list(found))):
        rows = sum(r.rows for r in chosen)
        if rows >= FEW:
            mean = sum(r.usage.completion_tokens for r in chosen) / rows
            variance = max(0.0, sum(r.squares for r in chosen) / rows - mean**2)
            return Lengths(mean, 1.96 * math.sqrt(variance / rows), rows, same)
    return None


def rates(found: Sequence[Run], kind: bytes) -> Rates | None:
    """Rates from past runs on the device of the latest run; None without past runs.

    1. Least squares of relative errors over the runs' steady parts, with no rate below 0 and a small pull to `BEFORE`.
    2. The rates are scaled to the past runs of this kind, if there are any.
    """
    chosen = [r for r in found if r.device == found[0].device and r.usage.device_seconds > 0 and r.rows]
    if not chosen:
        return None
    bodies = [r.body for r in chosen]
    known = np.array([amounts(usage, rows) for rows, usage in bodies], np.float64)
    seconds = np.array([usage.device_seconds for _, usage in bodies])
    likely = np.array(BEFORE) * float(np.median(seconds / (known @ np.array(BEFORE))))
    scaled = known * likely / seconds[:, None]
    sizes = np.array([rows for rows, _ in bodies], np.float64)
    weights = np.sqrt(sizes / sizes.max())[:, None]
    pull = math.sqrt(TRUST) * np.eye(4)
    factors = nonnegative(np.vstack([scaled * weights, pull]), np.append(weights[:, 0], np.full(4, math.sqrt(TRUST))))
    fitted = likely * factors
    own = np.array([r.kind == kind for r in chosen])
    if own.any() and (foretold := float((known[own] @ fitted).sum())):
        fitted = fitted * seconds[own].sum() / foretold
    alike = [r for r in chosen if r.kind == kind] or chosen
    a, b, c, d = fitted.tolist()
    clock = float(np.quantile([r.seconds / r.usage.device_seconds for r in alike], ALONE))
    return Rates((a, b, c, d), ends_of(alike, fitted), clock, chosen[0].device, len(chosen))


def ends_of(found: Sequence[Run], fitted: Floats) -> float:
    """Median device-seconds that runs took beyond the rates of their steady part."""
    beyond = [r.usage.device_seconds - float(np.dot(fitted, amounts(r.usage, r.rows))) for r in found if r.steady_rows]
    return max(0.0, statistics.median(beyond)) if beyond else 0.0


class Meter:
    """Measures one run, from the first prompt that the engine (already started) draws to the last answer.

    The steady part leaves out rows at the beginning and the end: at each end half of the most rows ever under way,
    because an engine draws about twice as many rows as it computes at a time.
    """

    def __init__(self) -> None:
        self.began: float | None = None
        self.ended = self.waited = 0.0
        self.drawn = self.answered = self.most = 0
        self.rows = self.steady_rows = 0
        self.usage, self.steady = Usage(), Usage()
        self.last: deque[tuple[int, Usage]] = deque()
        self.squares = 0.0

    def draw(self) -> None:
        """Count one more prompt that the engine draws."""
        if self.drawn == self.answered:  # the engine had no prompt since the last answer: that time is not counted
            now = time.monotonic()
            self.waited += 0.0 if self.began is None else now - self.ended
            self.began, self.ended = self.began or now, now
        self.drawn += 1
        self.most = max(self.most, self.drawn - self.answered)

    def add(self, usage: Usage) -> None:
        """Count one more answer."""
        now = time.monotonic()
        since, self.ended = now - self.ended, now
        self.answered += 1
        if usage.prompt_tokens:
            usage = usage if usage.device_seconds else replace(usage, device_seconds=since)
            self.last.append((self.rows, usage))
            self.rows += 1
            self.usage += usage
            self.squares += usage.completion_tokens**2
        ends = max(1, self.most // 2)
        while len(self.last) > ends:
            number, middle = self.last.popleft()
            if number >= ends:
                self.steady_rows += 1
                self.steady += middle

    def run(self, call: Call, plan: BatchPlan, device: str) -> Run | None:
        """The measured run; None if it has too few rows to tell anything."""
        if self.began is None or self.rows < LEAST_ROWS:
            return None
        enough = self.steady_rows >= max(LEAST_ROWS, self.most // 8)
        steady = (self.steady_rows, self.steady) if enough else (0, Usage())
        seconds = self.ended - self.began - self.waited
        return Run(kind_of(call, plan), device, self.rows, self.usage, self.squares, seconds, *steady)


def device_of(engine: object) -> str:
    """The device that the engine, or the engine that it wraps, says it runs on."""
    while engine is not None:
        if isinstance(found := getattr(engine, "device", None), str):
            return found
        engine = getattr(engine, "engine", None)
    return "unknown"
