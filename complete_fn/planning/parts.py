"""Pass: cuts the work into parts, the unit of placement and retry, of a bounded number of estimated tokens."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from complete_fn.planning.plan import BatchPlan
from complete_fn.tokens import BYTES_PER_TOKEN

PART_TOKENS = 2_000_000  # about a minute on one small GPU


def cut_parts(plan: BatchPlan, part_tokens: int = PART_TOKENS) -> BatchPlan:
    """The plan with `parts`: parts[p] is the first distinct prompt of part p, the last entry the number of prompts."""
    m = len(plan.first)
    ends = np.cumsum(estimated_tokens(plan))
    numbers = (np.maximum(ends, 1) - 1) // part_tokens if m else np.empty(0, np.int64)
    starts = np.flatnonzero(np.diff(numbers, prepend=-1)) if m else np.empty(0, np.int64)
    return replace(plan, parts=np.append(starts, m).astype(np.int64))


def estimated_tokens(plan: BatchPlan) -> npt.NDArray[np.int64]:
    """[m] tokens of each distinct prompt, estimated from its length in bytes."""
    tokens: npt.NDArray[np.int64] = np.ceil(plan.bytes() / BYTES_PER_TOKEN).astype(np.int64)
    return tokens
