"""A cap that is never passed: money is reserved at the worst case before a row is admitted, the rest returned after."""

from __future__ import annotations

import threading
from decimal import Decimal, InvalidOperation

from complete_fn.errors import InvalidOptionError


class Budget:
    """`limit` of one currency, shared by any number of threads; spent + reserved never exceeds it.

    `spent` counts from what was spent before, `name` is what a refused row is told.
    """

    def __init__(self, limit: Decimal, spent: Decimal = Decimal(0), name: str = "max_cost") -> None:
        self.limit = limit
        self.name = name
        self.spent = spent
        self.reserved = Decimal(0)
        self.lock = threading.Lock()

    def reserve(self, worst: Decimal) -> bool:
        with self.lock:
            if self.spent + self.reserved + worst > self.limit:
                return False
            self.reserved += worst
            return True

    def settle(self, worst: Decimal, actual: Decimal) -> None:
        with self.lock:
            self.reserved -= worst
            self.spent += actual

    def hopeless(self, worst: Decimal) -> bool:
        """Nothing is reserved and it still does not fit: no money will come back for it."""
        with self.lock:
            return self.reserved == 0 and self.spent + worst > self.limit


def parse_cap(value: object) -> Decimal:
    """`max_cost` as a Decimal.

    Raises:
        InvalidOptionError: not a number, not finite, or below zero.
    """
    try:
        cap = Decimal(str(value))
    except InvalidOperation as error:
        raise InvalidOptionError(f"max_cost = {value!r} is not a number.") from error
    if not cap.is_finite() or cap < 0 or isinstance(value, bool):
        raise InvalidOptionError(f"max_cost = {value!r} must be a number, at least 0.")
    return cap
