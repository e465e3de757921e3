"""A cap is never passed: a row's worst case is reserved before the row is admitted, and the rest returned after."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, Any

from complete_fn.engines.catalogue import Model
from complete_fn.engines.prices import amount
from complete_fn.errors import InvalidOptionError
from complete_fn.types import Usage

if TYPE_CHECKING:
    from complete_fn.spending.token_bound import PromptBound
    from complete_fn.store.attempts import Attempt

LARGEST_CAP = Decimal(9_000_000_000)  # of the currency; in billionths it fits into the store's 64 bits


def refuse_unpriced(model: Model, cap: str = "max_cost") -> None:
    """Refuse a cap on money where every token counts 0.

    Raises:
        InvalidOptionError: Nobody has said what the model's tokens cost.
    """
    if model.prices.basis == "unknown":
        raise InvalidOptionError(
            f"{cap} would bound nothing: the prices of {model.name!r} are not known. Give them beside the engine "
            "(--prices input=0.15,output=0.6, or prices= in Python) or in models.toml, or bound tokens with "
            "max_total_tokens."
        )


class Budget:
    """A limit in one currency, shared by any number of threads. Spent and reserved money never exceed it together.

    Args:
        spent: money that earlier attempts have spent.
        name: the cap's name in the error of a refused row.
    """

    def __init__(self, limit: Decimal, spent: Decimal = Decimal(0), name: str = "max_cost") -> None:
        self.limit = limit
        self.name = name
        self.spent = spent
        self.reserved = Decimal(0)
        self.currency: str | None = None
        self.lock = threading.Lock()

    def count_in(self, model: Model) -> None:
        """Count in the currency of the first model.

        Raises:
            InvalidOptionError: The model is priced in another currency than the first one, or its prices are not known.
        """
        refuse_unpriced(model, self.name)
        with self.lock:
            self.currency = self.currency or model.prices.currency
        if model.prices.currency != self.currency:
            raise InvalidOptionError(
                f"{self.name} counts {self.currency}, but {model.name!r} is priced in {model.prices.currency}. "
                "Use one session for each currency."
            )

    def reserve(self, worst: Decimal) -> bool:
        with self.lock:
            if self.spent + self.reserved + worst > self.limit:
                return False
            self.reserved += worst
            return True

    def can_add(self, more: Decimal) -> bool:
        """Whether so much may be spent in addition to what is spent and reserved."""
        with self.lock:
            return self.spent + self.reserved + more <= self.limit

    def settle(self, worst: Decimal, actual: Decimal) -> None:
        with self.lock:
            self.reserved -= worst
            self.spent += actual

    def for_attempt(self, attempt: Attempt) -> Budget:
        """The budget from which one attempt reserves: this budget, because it belongs to one process."""
        return self

    def release(self) -> None:
        """Return held money. No row may be under way."""

    def hopeless(self, worst: Decimal) -> bool:
        """Whether the row can never fit: nothing is reserved that could be returned, and too little is left."""
        with self.lock:
            return self.reserved == 0 and self.spent + worst > self.limit


@dataclass(frozen=True)
class Brake:
    """One query's own caps, in addition to its session's."""

    money: Budget | None = None
    tokens: Budget | None = None

    @classmethod
    def of(cls, max_cost: Any, max_total_tokens: int | None) -> Brake:
        """Raises:
        InvalidOptionError: `max_cost` is no amount, or `max_total_tokens` no whole number.
        """
        return cls(
            None if max_cost is None else Budget(parse_cap(max_cost), name="The query's max_cost"),
            None
            if max_total_tokens is None
            else Budget(parse_token_cap(max_total_tokens), name="The query's max_total_tokens"),
        )

    def __bool__(self) -> bool:
        return self.money is not None or self.tokens is not None


NO_BRAKE = Brake()


class Caps:
    """The caps of one run, on money and on tokens. A row is admitted only if each cap covers its worst case.

    `bound` says how many tokens the row's prompt can have.
    """

    def __init__(
        self, bound: PromptBound, money: Budget | None = None, tokens: Budget | None = None, brake: Brake = NO_BRAKE
    ) -> None:
        self.bound, self.prices = bound, bound.model.prices
        given = [(money, self.money), (tokens, whole_tokens), (brake.money, self.money), (brake.tokens, whole_tokens)]
        self.budgets = [(budget, unit) for budget, unit in given if budget is not None]

    def money(self, usage: Usage) -> Decimal:
        return amount(self.prices, usage)

    def __bool__(self) -> bool:
        return bool(self.budgets)

    def reserve(self, worst: Usage) -> bool:
        for number, (budget, unit) in enumerate(self.budgets):
            if not budget.reserve(unit(worst)):
                for earlier, its_unit in self.budgets[:number]:
                    earlier.settle(its_unit(worst), Decimal(0))
                return False
        return True

    def settle(self, worst: Usage, actual: Usage) -> None:
        for budget, unit in self.budgets:
            budget.settle(unit(worst), unit(actual))

    def hold(self, worst: Usage, actual: Usage) -> bool:
        """Whether each cap holds although the row used more than was reserved for it."""
        return all(budget.can_add(unit(actual) - unit(worst)) for budget, unit in self.budgets)

    def refusal(self, worst: Usage) -> str | None:
        """Why the row can never be admitted; None while returned money or tokens could still make room for it."""
        for budget, unit in self.budgets:
            if budget.hopeless(unit(worst)):
                left = budget.limit - budget.spent
                if unit is whole_tokens:
                    return f"{budget.name} {budget.limit:,} leaves {left:,}; the row may take {unit(worst):,} tokens."
                money = f"leaves {left:.9f}; the row may cost {unit(worst):.9f} at list price."
                return f"{budget.name} {budget.limit} {money}"
        return None


def whole_tokens(usage: Usage) -> Decimal:
    """Tokens of prompt and answer."""
    return Decimal(usage.prompt_tokens + usage.completion_tokens)


def parse_token_cap(value: object) -> Decimal:
    """`max_total_tokens` as a Decimal.

    Raises:
        InvalidOptionError: The value is not a whole number, or is below zero.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise InvalidOptionError(f"max_total_tokens = {value!r} must be a whole number, at least 0.")
    return Decimal(value)


def parse_cap(value: object) -> Decimal:
    """`max_cost` as a Decimal.

    Raises:
        InvalidOptionError: The value is not a number, not finite, below zero or above `LARGEST_CAP`.
    """
    try:
        cap = Decimal(str(value))
    except InvalidOperation as error:
        raise InvalidOptionError(f"max_cost = {value!r} is not a number.") from error
    if not cap.is_finite() or not 0 <= cap <= LARGEST_CAP or isinstance(value, bool):
        raise InvalidOptionError(f"max_cost = {value!r} must be a number, at least 0 and at most {LARGEST_CAP:,}.")
    return cap
