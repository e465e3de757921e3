"""A `BatchPlan` is a column of prompts in execution order, as row numbers: the prompts stay in the caller's arrays."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from complete_fn.interrupts import end_if_abandoned
from complete_fn.planning.row_gather import Gatherer
from complete_fn.text import to_texts
from complete_fn.tokens import TokenSizes

Rows: TypeAlias = npt.NDArray[np.int64]


@dataclass(frozen=True)
class BatchPlan:
    """n prompts, m of them distinct.

    Attributes:
        prompts: the caller's column, large_string, n values, never copied.
        mergeable: whether equal prompts have equal answers (greedy sampling only).
        order: [k] numbers of the k rows that are not NULL, in byte order of their prompts.
        distinct: [k] for each entry of `order`, the number of its distinct prompt; never decreasing.
        first: [m] the row that stands for each distinct prompt, in execution order.
        parts: bounds that cut the m distinct prompts into parts of a limited number of estimated tokens: part p runs
            the prompts from parts[p] up to, but not including, parts[p + 1].
        field_order: [m, most fields] for each distinct prompt the order of its fields, -1 beyond the last; None where
            no prompt's fields are kept apart.
        sizes: counts tokens, for the passes that need counts.
    """

    prompts: pa.ChunkedArray
    mergeable: bool = True
    order: Rows = field(default_factory=lambda: np.empty(0, np.int64))
    distinct: Rows = field(default_factory=lambda: np.empty(0, np.int64))
    first: Rows = field(default_factory=lambda: np.empty(0, np.int64))
    parts: Rows = field(default_factory=lambda: np.zeros(1, np.int64))
    field_order: npt.NDArray[np.int16] | None = None
    sizes: TokenSizes = TokenSizes()

    @cached_property
    def gather(self) -> Gatherer:
        return Gatherer(self.prompts)

    def texts(self, start: int = 0, stop: int | None = None, step: int = 1024) -> Iterator[tuple[int, list[str]]]:
        """(number of the first, texts) of the distinct prompts start..stop, in execution order, `step` at a time."""
        end = len(self.first) if stop is None else stop
        for low in range(start, end, step):
            end_if_abandoned()
            rows = self.first[low : min(low + step, end)]
            yield low, to_texts(self.gather.take(rows))

    def rows_of_distinct(self) -> Rows:
        """[n] the number of each row's distinct prompt, in the caller's order; -1 for NULL."""
        of_row = np.full(len(self.prompts), -1, np.int64)
        of_row[self.order] = self.distinct
        return of_row

    def rows_of(self, number: int) -> list[int]:
        """The rows that have one distinct prompt."""
        rows: list[int] = self.order[self.distinct == number].tolist()
        return rows

    def copies(self) -> Rows:
        """[m] the number of rows that have each distinct prompt."""
        return np.bincount(self.distinct, minlength=len(self.first)).astype(np.int64)

    def moved(self) -> npt.NDArray[np.bool_]:
        """[m] whether each distinct prompt's fields have another order than in its template."""
        if self.field_order is None:
            return np.zeros(len(self.first), bool)
        own = np.arange(self.field_order.shape[1])
        moved: npt.NDArray[np.bool_] = ((self.field_order != own) & (self.field_order >= 0)).any(axis=1)
        return moved

    def bytes(self) -> Rows:
        """[m] length of each distinct prompt in bytes."""
        lengths: Rows = pc.binary_length(self.prompts).to_numpy()[self.first].astype(np.int64)
        return lengths

    def scatter(self, answers: Any) -> Any:
        """The answers of the n rows in the caller's order, from the answers of the m distinct prompts (Arrow arrays).

        A NULL prompt has a NULL answer.
        """
        of_row = self.rows_of_distinct()
        return answers.take(pa.array(of_row, mask=of_row < 0))


def with_first(plan: BatchPlan, starts: npt.NDArray[np.bool_]) -> BatchPlan:
    """The plan in which a new distinct prompt begins wherever `starts` is true along `order`."""
    return replace(plan, distinct=np.cumsum(starts, dtype=np.int64) - 1, first=plan.order[starts])
