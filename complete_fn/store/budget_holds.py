"""An attempt holds money of shared budgets: it draws, spends with its slices, returns the rest. Inside transactions."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

import sqlalchemy as sa

from complete_fn.store.tables import budgets, reservations

if TYPE_CHECKING:
    from complete_fn.store.attempts import Attempt


class Refused(Exception):
    """A budget has less left than the attempt asks for. The transaction is rolled back."""


def draw(connection: sa.Connection, attempt: Attempt, nano: int) -> None:
    """Reserve `nano` of each budget, in the order of their names, so that no two draws deadlock."""
    for name in sorted(attempt.budgets):
        mine = (budgets.c.tenant == attempt.tenant) & (budgets.c.name == name)
        fits = budgets.c.spent_nano + budgets.c.reserved_nano + nano <= budgets.c.limit_nano
        more = budgets.update().where(mine, fits)
        if not connection.execute(more.values(reserved_nano=budgets.c.reserved_nano + nano)).rowcount:
            raise Refused
        held = (reservations.c.attempt == attempt.id) & (reservations.c.name == name)
        again = reservations.update().where(held).values(nano=reservations.c.nano + nano)
        if not connection.execute(again).rowcount:
            connection.execute(reservations.insert().values(attempt=attempt.id, name=name, nano=nano))


def charge(connection: sa.Connection, attempt: Attempt, nano: int, at: float) -> None:
    """Turn reserved money into spent money, of the budget of the day `at` even if the attempt did not draw from it.

    Money that was drawn on another day returns to that day's budget.
    """
    if not nano:
        return
    today = day_budget(at, attempt.currency)
    mine = sa.select(reservations.c.name, reservations.c.nano).where(reservations.c.attempt == attempt.id)
    held = {row.name: row.nano for row in connection.execute(mine)} if attempt.budgets else {}
    for name in sorted({*attempt.budgets, *held, today}):
        spent = nano if name == today or not name.startswith("day:") else 0
        returned = min(nano, held.get(name, 0))
        of_tenant = (budgets.c.tenant == attempt.tenant) & (budgets.c.name == name)
        values = {"spent_nano": budgets.c.spent_nano + spent, "reserved_nano": budgets.c.reserved_nano - returned}
        connection.execute(budgets.update().where(of_tenant).values(values))
        if returned:
            of_name = (reservations.c.attempt == attempt.id) & (reservations.c.name == name)
            connection.execute(reservations.update().where(of_name).values(nano=reservations.c.nano - returned))


def day_budget(at: float, currency: str) -> str:
    """The name of the budget of a day (UTC) in one currency."""
    return f"day:{datetime.fromtimestamp(at, UTC).date()}:{currency}"


def release(connection: sa.Connection, attempt: Attempt) -> None:
    """Return to the budgets the money that the attempt has reserved."""
    held = sa.select(reservations.c.name, reservations.c.nano).where(reservations.c.attempt == attempt.id)
    for name, nano in sorted(connection.execute(held)):
        mine = (budgets.c.tenant == attempt.tenant) & (budgets.c.name == name)
        connection.execute(budgets.update().where(mine).values(reserved_nano=budgets.c.reserved_nano - nano))
    connection.execute(reservations.delete().where(reservations.c.attempt == attempt.id))
