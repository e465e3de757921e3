"""`Gatherer` takes rows of a chunked column by number. Arrow's own `take` would copy the whole column at every call."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa


class Gatherer:
    """Takes rows from their chunks, and copies only these rows."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        self.column = column
        self.ends = np.cumsum([len(c) for c in column.chunks], dtype=np.int64)

    def take(self, rows: npt.NDArray[np.int64]) -> pa.Array:
        """[k] the values at [k] row numbers, in their order."""
        chunk = np.searchsorted(self.ends, rows, side="right")
        grouped = np.argsort(chunk, kind="stable")
        present, counts = np.unique(chunk, return_counts=True)
        pieces, low = [], 0
        for number, count in zip(present.tolist(), counts.tolist(), strict=True):
            inside = rows[grouped[low : low + count]] - (self.ends[number] - len(self.column.chunk(number)))
            pieces.append(self.column.chunk(number).take(pa.array(inside)))
            low += count
        if len(pieces) == 1:
            return pieces[0]
        back = np.empty(len(rows), np.int64)
        back[grouped] = np.arange(len(rows))
        joined = pa.concat_arrays(pieces) if pieces else pa.array([], self.column.type)
        return joined.take(pa.array(back))
