"""What past runs took, for the estimate of the next: seconds by tokens of a class, and the lengths of answers.

Each run leaves one row (table `runs`): its tokens, and the seconds from its first prompt to its last answer, without
the engine's start. Runs that share an engine at the same time are each charged the whole time: their rates err on the
slow side.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import numpy.typing as npt
import sqlalchemy as sa

from complete_fn.errors import StoreError
from complete_fn.field_prompts import has_fields, unpack_fields
from complete_fn.keys import Call
from complete_fn.plan import BatchPlan
from complete_fn.store import Store
from complete_fn.tables import runs
from complete_fn.types import Usage

KEPT = 20_000  # runs in the table at most
PAST = 200  # runs that are looked at, the latest
FEW = 20  # rows below which past answers say nothing
LEAST_ROWS = 8  # of a run that is kept
BEFORE = (1.0, 0.05, 8.0, 20.0)  # likely cost of an uncached and a cached token in, a token out, and a row; relative
TRUST = 0.0005  # weight of BEFORE against the largest past run
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Run:
    """One past run. `kind`: see `kind_of`; `seconds` on `device`."""

    kind: bytes
    device: str
    rows: int
    usage: Usage
    squares: float
    seconds: float

    @property
    def amounts(self) -> tuple[int, int, int, int]:
        u = self.usage
        return u.prompt_tokens - u.cached_tokens, u.cached_tokens, u.completion_tokens, self.rows


@dataclass(frozen=True, slots=True)
class Rates:
    """Seconds per uncached prompt token, cached prompt token, output token and row, from `runs` past runs."""

    seconds: tuple[float, float, float, float]
    device: str
    runs: int

    def of(self, usage: Usage, rows: int) -> float:
        amounts = usage.prompt_tokens - usage.cached_tokens, usage.cached_tokens, usage.completion_tokens, rows
        return float(np.dot(self.seconds, amounts))


@dataclass(frozen=True, slots=True)
class Lengths:
    """Output tokens of an answer: `mean`, half its 95 % interval, of `rows` past ones; `same`: to this instruction."""

    mean: float
    margin: float
    rows: int
    same: bool


def kind_of(call: Call, plan: BatchPlan) -> bytes:
    """Tells runs apart by model, options and instruction: what all prompts begin with, up to a white space."""
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
    """Note a run for later estimates; its answers are safe, so a store that cannot be written now fails nothing."""
    row = {
        "at": time.time(),
        "tenant": tenant,
        "model": model,
        "device": run.device,
        "kind": run.kind,
        "rows": run.rows,
        "prompt_tokens": run.usage.prompt_tokens,
        "cached_tokens": run.usage.cached_tokens,
        "completion_tokens": run.usage.completion_tokens,
        "squares": run.squares,
        "seconds": run.seconds,
    }
    with suppress(StoreError), store.write() as connection:
        made = connection.execute(runs.insert().values(row).returning(runs.c.id)).scalar_one()
        connection.execute(runs.delete().where(runs.c.id <= made - KEPT))


def past(store: Store, model: str, tenant: str | None = None) -> list[Run]:
    """The latest runs of a model, the newest first: all for rates of this machine, a tenant's own for its answers."""
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
            Usage(r["prompt_tokens"], r["cached_tokens"], r["completion_tokens"]),
            r["squares"],
            r["seconds"],
        )
        for r in rows
    ]


def lengths(found: Sequence[Run], kind: bytes) -> Lengths | None:
    """Of past answers to the same instruction with the same options, else of all the model's; None of too few."""
    for same, chosen in ((True, [r for r in found if r.kind == kind]), (False, list(found))):
        rows = sum(r.rows for r in chosen)
        if rows >= FEW:
            mean = sum(r.usage.completion_tokens for r in chosen) / rows
            variance = max(0.0, sum(r.squares for r in chosen) / rows - mean**2)
            return Lengths(mean, 1.96 * math.sqrt(variance / rows), rows, same)
    return None


def rates(found: Sequence[Run], kind: bytes) -> Rates | None:
    """Least squares of relative errors over past runs on the device of the latest, none below 0, drawn a little to
    `BEFORE`; then scaled to the past runs of this kind. None without past runs."""
    chosen = [r for r in found if r.device == found[0].device and r.seconds > 0 and r.rows]
    if not chosen:
        return None
    amounts = np.array([r.amounts for r in chosen], np.float64)
    seconds = np.array([r.seconds for r in chosen])
    likely = np.array(BEFORE) * float(np.median(seconds / (amounts @ np.array(BEFORE))))
    scaled = amounts * likely / seconds[:, None]
    weights = np.sqrt(np.array([r.rows for r in chosen], np.float64) / max(r.rows for r in chosen))[:, None]
    pull = math.sqrt(TRUST) * np.eye(4)
    factors = nonnegative(np.vstack([scaled * weights, pull]), np.append(weights[:, 0], np.full(4, math.sqrt(TRUST))))
    fitted = likely * factors
    own = [(r.seconds, float(np.dot(fitted, r.amounts))) for r in chosen if r.kind == kind]
    if own and sum(p for _, p in own):
        fitted = fitted * sum(s for s, _ in own) / sum(p for _, p in own)
    a, b, c, d = fitted.tolist()
    return Rates((a, b, c, d), chosen[0].device, len(chosen))


def nonnegative(matrix: Floats, target: Floats) -> Floats:
    """Least squares without negative coefficients: the best of all sets of columns, of which there are few."""
    columns = matrix.shape[1]
    best, least = np.zeros(columns), float((target**2).sum())
    for size in range(1, columns + 1):
        for chosen in combinations(range(columns), size):
            found = np.linalg.lstsq(matrix[:, chosen], target, rcond=None)[0]
            left = float(((matrix[:, chosen] @ found - target) ** 2).sum())
            if (found >= 0).all() and left < least:
                best, least = np.zeros(columns), left
                best[list(chosen)] = found
    return best


class Meter:
    """What one run takes: from its first prompt drawn by the engine, which is up then, to its last answer."""

    def __init__(self) -> None:
        self.began: float | None = None
        self.ended = 0.0
        self.rows = 0
        self.usage = Usage()
        self.squares = 0.0

    def start(self) -> None:
        if self.began is None:
            self.began = time.monotonic()

    def add(self, usage: Usage) -> None:
        self.ended = time.monotonic()
        if usage.prompt_tokens:
            self.rows += 1
            self.usage += usage
            self.squares += usage.completion_tokens**2

    def run(self, call: Call, plan: BatchPlan, device: str) -> Run | None:
        """None of a run too small to tell anything."""
        if self.began is None or self.rows < LEAST_ROWS:
            return None
        return Run(kind_of(call, plan), device, self.rows, self.usage, self.squares, self.ended - self.began)


def device_of(engine: object) -> str:
    """What the engine runs on, as it says itself; an engine within another is asked."""
    while engine is not None:
        if isinstance(found := getattr(engine, "device", None), str):
            return found
        engine = getattr(engine, "engine", None)
    return "unknown"
