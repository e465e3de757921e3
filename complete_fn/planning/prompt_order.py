"""Pass: drops NULLs and sorts the prompts by their bytes, so that prompts with a common beginning are neighbours."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow.compute as pc

from complete_fn.planning.plan import BatchPlan


def byte_order(plan: BatchPlan) -> BatchPlan:
    """Byte order equals the order by token prefixes, except for the token at the boundary. n log n, 8 bytes a row."""
    indices = pc.sort_indices(plan.prompts).to_numpy().view(np.int64)  # NULLs come last
    answerable = len(plan.prompts) - plan.prompts.null_count
    return replace(plan, order=indices[:answerable])
