"""A demonstration model knows a few instructions. This module advises a caller whose prompts are something else."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from complete_fn.engines.catalogue import Model


def advice_for(model: Model, prompts: Any) -> str | None:
    """Advice if some prompts begin with none of the model's instructions, else None.

    Args:
        prompts: [n] large_string.
    """
    if not model.instructions:
        return None
    learnt = pa.scalar(False)
    for instruction in model.instructions:
        learnt = pc.or_(learnt, pc.starts_with(prompts, instruction))
    strangers = pc.sum(pc.invert(learnt)).as_py()
    if not strangers:
        return None
    known = ", ".join(repr(i + "...") for i in model.instructions)
    return (
        f"{model.name} is a demonstration model and knows only {known}; {strangers:,} of {len(prompts):,} "
        "prompts are something else. For real work name 'smollm2-360m' or 'qwen2.5-0.5b' on a CPU, "
        "'llama-8b-swiftkv' on a GPU (`complete-fn models` lists all)."
    )
