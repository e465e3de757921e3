"""A session's caps count what earlier attempts of its unfinished jobs have already spent."""

from __future__ import annotations

import threading
from decimal import Decimal
from typing import Any

from complete_fn.engines.catalogue import Model
from complete_fn.host import renew_in_child
from complete_fn.ledger.usage import tokens_used
from complete_fn.spending.budget import Budget, parse_cap, parse_token_cap
from complete_fn.store.store import Store


class SessionBudgets:
    """The caps of one session. Safe to use from several threads.

    Attributes:
        money, tokens: the caps; None for no cap.
    """

    def __init__(self, max_cost: Any, max_total_tokens: int | None) -> None:
        """Raises:
        InvalidOptionError: `max_cost` is no amount, or `max_total_tokens` no whole number.
        """
        self.money = None if max_cost is None else Budget(parse_cap(max_cost))
        self.tokens: Budget | None = None
        if max_total_tokens is not None:
            self.tokens = Budget(parse_token_cap(max_total_tokens), name="max_total_tokens")
        self.lock = threading.Lock()
        renew_in_child(self)
        self.settled: set[tuple[str, str]] = set()  # (cap, job) whose earlier attempts are counted

    def of_run(self, model: Model, job: str | None, store: Store, tenant: str) -> tuple[Budget | None, Budget | None]:
        """(cap on money, cap on tokens) of a run.

        Raises:
            InvalidOptionError: The model is priced in another currency than the session's first model.
        """
        if self.money is not None:
            self.money.count_in(model)
            if job is not None and self.is_new("money", job):
                self.money.settle(Decimal(0), store.spent(tenant, job))
        if self.tokens is not None and job is not None and self.is_new("tokens", job):
            self.tokens.settle(Decimal(0), Decimal(tokens_used(store, tenant, job)))
        return self.money, self.tokens

    def is_new(self, cap: str, job: str) -> bool:
        with self.lock:
            counted = (cap, job) in self.settled
            self.settled.add((cap, job))
        return not counted

    def after_fork(self) -> None:
        """Give a forked child new locks: a lock that another thread held during the fork is never released there."""
        self.lock = threading.Lock()
        for budget in (self.money, self.tokens):
            if budget is not None:
                budget.lock = threading.Lock()
