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
    """Turn reserved money into spent money. Today's budget counts it even if the attempt did not draw from it."""
    today = f"day:{datetime.fromtimestamp(at, UTC).date()}"
    unbound = () if any(name.startswith("day:") for name in attempt.budgets) else (today,)
    for name in sorted((*attempt.budgets, *unbound)) if nano else ():
        reserved = nano if name in attempt.budgets else 0
        mine = (budgets.c.tenant == attempt.tenant) & (budgets.c.name == name)
        spent = {"spent_nano": budgets.c.spent_nano + nano, "reserved_nano": budgets.c.reserved_nano - reserved}
        connection.execute(budgets.update().where(mine).values(spent))
        held = (reservations.c.attempt == attempt.id) & (reservations.c.name == name)
        connection.execute(reservations.update().where(held).values(nano=reservations.c.nano - reserved))


def release(connection: sa.Connection, attempt: Attempt) -> None:
    """Return to the budgets the money that the attempt has reserved."""
    held = sa.select(reservations.c.name, reservations.c.nano).where(reservations.c.attempt == attempt.id)
    for name, nano in sorted(connection.execute(held)):
        mine = (budgets.c.tenant == attempt.tenant) & (budgets.c.name == name)
        connection.execute(budgets.update().where(mine).values(reserved_nano=budgets.c.reserved_nano - nano))
    connection.execute(reservations.delete().where(reservations.c.attempt == attempt.id))
