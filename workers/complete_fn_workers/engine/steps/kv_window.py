"""Admission by tokens: rows are submitted to vLLM only as far as its KV cache holds them with their longest answers.

So nothing is preempted, and the prefix that the planner put in front of a group stays resident until the group is
through. Rows come in the planner's order; what a row shares with the one submitted before it is held once. The rows
under way are therefore a list in which each has the blocks that it shares with the one before; when one leaves, the
next shares with the one before that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(slots=True, eq=False)
class HeldRow:
    """A row under way: its blocks with the longest answer, and those that it has from `before`."""

    blocks: int
    shared: int
    before: HeldRow | None = None
    after: HeldRow | None = None


class KVWindow:
    """Blocks of KV cache that the rows under way can need at most: `used` of `blocks`, each of `block` tokens."""

    def __init__(self, blocks: int, block: int) -> None:
        self.blocks = blocks
        self.block = block
        self.used = 0
        self.rows: dict[str, HeldRow] = {}
        self.last: HeldRow | None = None
        self.beginning: tuple[str, Sequence[int]] = ("", ())

    def row(self, salt: str, ids: Sequence[int], answer: int) -> HeldRow:
        """The row that would follow: `ids` of its prompt and at most `answer` tokens. Salts share nothing."""
        blocks = -(-(len(ids) + answer) // self.block)
        shared = 0
        if self.last is not None and self.beginning[0] == salt:
            before = self.beginning[1]
            shared = min(common_blocks(before, ids, self.block), self.last.blocks)
        return HeldRow(blocks, shared, self.last)

    def fits(self, row: HeldRow) -> bool:
        """Whether the row may be submitted. One is always let through: vLLM has refused what never fits."""
        return not self.rows or self.used + row.blocks - row.shared <= self.blocks

    def hold(self, key: str, row: HeldRow, salt: str, ids: Sequence[int]) -> None:
        self.rows[key] = row
        if self.last is not None:
            self.last.after = row
        self.last, self.beginning = row, (salt, ids)
        self.used += row.blocks - row.shared

    def release(self, key: str) -> None:
        """The row has its answer, or was taken back."""
        row = self.rows.pop(key, None)
        if row is None:
            return
        self.used -= row.blocks - row.shared
        if row.before is not None:
            row.before.after = row.after
        if row.after is not None:
            still = min(row.shared, row.after.shared) if row.before is not None else 0
            self.used += row.after.shared - still
            row.after.shared, row.after.before = still, row.before
        if self.last is row:
            self.last = row.before
            self.beginning = ("", ())  # the prompt of the row before is not kept


def common_blocks(before: Sequence[int], ids: Sequence[int], block: int) -> int:
    """Whole blocks that two prompts begin with in common, but never the last token of a prompt."""
    most = min(len(before), len(ids) - 1) // block
    for number in range(most):
        low = number * block
        if before[low : low + block] != ids[low : low + block]:
            return number
    return max(0, most)
