"""Least squares for what cannot be negative: times and costs."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def nonnegative(matrix: Floats, target: Floats) -> Floats:
    """Least squares without negative coefficients: the best of all sets of columns, of which there are few."""
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
