"""Least squares with coefficients that cannot be negative, such as times and costs."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def nonnegative(matrix: Floats, target: Floats) -> Floats:
    """Least squares without negative coefficients. All sets of columns are tried, because there are few columns."""
    columns = matrix.shape[1]
    best, least = np.zeros(columns), float((target**2).sum())
    for size in range(1, columns + 1):
        for chosen in combinations(range(columns), size):
            found = np.linalg.lstsq(matrix[:, chosen], target, rcond=None)[0]
            left = float(((matrix[:, chosen] @ found - target) ** 2).sum())
            if (found >= 0).all() and left < least:
                best, least = np.zeros(columns), left
                best[list(chosen)] = found
    return best
