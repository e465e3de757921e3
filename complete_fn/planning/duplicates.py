"""Pass: equal prompts become one. Sorting has made them neighbours, so the pass needs no hash table and no copy."""

from __future__ import annotations

import numpy as np
import pyarrow.compute as pc

from complete_fn.planning.plan import BatchPlan, with_first

WINDOW = 65_536  # rows compared at a time: bounds the memory for their texts


def merge_duplicates(plan: BatchPlan) -> BatchPlan:
    starts = np.ones(len(plan.order), bool)
    if plan.mergeable:
        for low in range(1, len(plan.order), WINDOW):
            high = min(low + WINDOW, len(plan.order))
            texts = plan.gather.take(plan.order[low - 1 : high])
            starts[low:high] = pc.not_equal(texts[1:], texts[:-1]).to_numpy(zero_copy_only=False)
    return with_first(plan, starts)
