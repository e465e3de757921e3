"""An attempt stands for each run that writes answers, so that a run that died is noticed."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from complete_fn.store.tables import attempts
from complete_fn.types import Completion


@dataclass(frozen=True, slots=True)
class StoredAnswer:
    """An answer to be written. If `job` is set, only that job may read it (not greedy, an error, or cache off)."""

    key: bytes
    completion: Completion
    job: str | None = None


@dataclass(slots=True)
class Attempt:
    """One execution of run(), with its caller, model and job. `step` counts the attempt's changes in the store."""

    id: int
    tenant: str
    user: str
    model: str
    job: str | None
    query_tag: str | None
    currency: str
    basis: str
    step: int = 0
    budgets: tuple[str, ...] = ()
    turn: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)


def attempt_of(row: Mapping[Any, Any]) -> Attempt:
    return Attempt(**{f.name: row[f.name] for f in fields(Attempt) if f.name in attempts.c})
