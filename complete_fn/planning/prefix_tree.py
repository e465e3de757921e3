"""The prefix tree of prompts in execution order is one number per prompt: the tokens shared with the prompt before.

In execution order (byte order, or the planner's order of fields) prompts with a common beginning are neighbours. A
prompt shares its longest beginning with its neighbour, so these numbers hold the whole tree.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from complete_fn.planning.field_order import common, rendered
from complete_fn.planning.plan import BatchPlan
from complete_fn.prompts.fields import has_fields
from complete_fn.text import encode_text
from complete_fn.tokens import BYTES_PER_TOKEN

SLACK = 0.25  # share of its size by which a part may be smaller or larger, for a cheaper cut
Ints = npt.NDArray[np.int64]


def common_tokens(before: Sequence[int], tokens: Sequence[int]) -> int:
    """The number of leading token ids that two prompts have in common."""
    for at, (a, b) in enumerate(zip(before, tokens, strict=False)):
        if a != b:
            return at
    return min(len(before), len(tokens))


def hits(shared: int, length: int, block: int) -> int:
    """Tokens that vLLM's prefix cache returns: whole blocks only, and never the last token of a prompt."""
    return max(0, min(shared, length - 1)) // block * block


def cut_tree(shared: Ints, tokens: Ints, part_tokens: int, slack: float = SLACK) -> Ints:
    """[parts + 1] prompt numbers that cut m prompts into parts of about `part_tokens`; 0 and m are included.

    Each cut falls where a prompt shares the least with the prompt before it, at a part size between `slack` below and
    `slack` above `part_tokens`; among equal places at the last. The next part's worker computes shared tokens again.

    Args:
        shared: [m] tokens of each prompt that the prompt before it has left in the cache.
        tokens: [m] tokens of each prompt.
    """
    m, cuts = len(tokens), [0]
    ends = np.cumsum(tokens)
    while cuts[-1] < m:
        begun = int(ends[cuts[-1] - 1]) if cuts[-1] else 0
        sizes = [begun + part_tokens * (1 - slack), begun + part_tokens * (1 + slack)]
        ends_at = np.searchsorted(ends, sizes, "right")
        low, high = (max(int(at), cuts[-1] + 1) for at in ends_at)
        if high >= m:
            cuts.append(m)
            break
        window = shared[low : high + 1]
        cuts.append(high - int(np.argmin(window[::-1])))
    return np.array(cuts if m else [0], np.int64)


def shared_beginnings(plan: BatchPlan) -> Ints:
    """[m] tokens that each distinct prompt shares with the one before it, estimated from the bytes in common."""
    shared = np.zeros(len(plan.first), np.int64)
    before = b""
    for low, texts in plan.texts():
        for number, text in enumerate(texts, low):
            now = encode_text(rendered(plan, number, text) if has_fields(text) else text)
            shared[number] = int(common(before, now) / BYTES_PER_TOKEN)
            before = now
    return shared
