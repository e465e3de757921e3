"""`KVWindow` admits a row to vLLM only if the KV cache holds it, with its longest answer, beside all rows under way.

So vLLM preempts no row, and the prefix of a group stays in the cache until the group is done. Rows come in the
planner's order, and the blocks that a row shares with the row before it count once. The rows under way form a list in
which each row knows the blocks it shares with its predecessor. When a row leaves, its neighbours are linked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(slots=True, eq=False)
class HeldRow:
    """A row under way: its blocks with the longest answer, and how many of them it shares with `before`."""

    blocks: int
    shared: int
    before: HeldRow | None = None
    after: HeldRow | None = None


class KVWindow:
    """The most blocks of KV cache that the rows under way can need: `used` of `blocks`, each of `block` tokens."""

    def __init__(self, blocks: int, block: int) -> None:
        self.blocks = blocks
        self.block = block
        self.used = 0
        self.rows: dict[str, HeldRow] = {}
        self.last: HeldRow | None = None
        self.beginning: tuple[str, Sequence[int]] = ("", ())

    def row(self, salt: str, ids: Sequence[int], answer: int) -> HeldRow:
        """The next row, with the prompt `ids` and at most `answer` tokens. Rows of different salts share no blocks."""
        blocks = -(-(len(ids) + answer) // self.block)
        shared = 0
        if self.last is not None and self.beginning[0] == salt:
            before = self.beginning[1]
            shared = min(common_blocks(before, ids, self.block), self.last.blocks)
        return HeldRow(blocks, shared, self.last)

    def fits(self, row: HeldRow) -> bool:
        """Whether the row may be submitted. A single row always may: vLLM itself refuses a row that never fits."""
        return not self.rows or self.used + row.blocks - row.shared <= self.blocks

    def hold(self, key: str, row: HeldRow, salt: str, ids: Sequence[int]) -> None:
        self.rows[key] = row
        if self.last is not None:
            self.last.after = row
        self.last, self.beginning = row, (salt, ids)
        self.used += row.blocks - row.shared

    def release(self, key: str) -> None:
        """Take out a row that has its answer or was aborted."""
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
    """Whole blocks at the common beginning of two prompts, without a prompt's last token."""
    most = min(len(before), len(ids) - 1) // block
    for number in range(most):
        low = number * block
        if before[low : low + block] != ids[low : low + block]:
            return number
    return max(0, most)
