"""`make_plan` turns a column of prompts into work in execution order, by the passes in `PASSES`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyarrow as pa

from complete_fn.interrupts import end_if_abandoned
from complete_fn.planning.duplicates import merge_duplicates
from complete_fn.planning.field_order import order_fields
from complete_fn.planning.parts import cut_parts
from complete_fn.planning.plan import BatchPlan
from complete_fn.planning.prompt_order import byte_order
from complete_fn.tokens import BY_BYTES, TokenSizes

__all__ = ["PASSES", "BatchPlan", "TokenSizes", "make_plan"]

Pass = Callable[[BatchPlan], BatchPlan]


def make_plan(prompts: Any, mergeable: bool = True, sizes: TokenSizes = BY_BYTES) -> BatchPlan:
    """Plan a column of prompts.

    Args:
        prompts: Array or ChunkedArray of any string type.
        mergeable: False where equal prompts may have different answers (temperature above 0).
        sizes: counts tokens; used only where prompts have fields whose order the planner may choose.
    """
    chunked = prompts if isinstance(prompts, pa.ChunkedArray) else pa.chunked_array([prompts])
    plan = BatchPlan(chunked.cast(pa.large_string()), mergeable, sizes=sizes)
    for step in PASSES:
        end_if_abandoned()
        plan = step(plan)
    return plan


PASSES: tuple[Pass, ...] = (byte_order, merge_duplicates, order_fields, cut_parts)
