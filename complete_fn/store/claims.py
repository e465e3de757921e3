"""If several runs ask for one answer at the same time, claims let only one run compute it. Inside transactions.

An attempt claims keys when it hands their prompts to the engine. It releases them with the slice that holds their
answers, or at its end. So an attempt never waits while it holds a claim on a prompt that it is not computing, and no
two runs wait for each other.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from complete_fn.store.job_tables import parts
from complete_fn.store.tables import answers, attempts, claims
from complete_fn.store.transactions import insert_into

if TYPE_CHECKING:
    from complete_fn.store.attempts import Attempt


def claim(connection: sa.Connection, attempt: Attempt, keys: Sequence[bytes]) -> set[bytes]:
    """Claim the keys that have no answer and that no other attempt has claimed; returns these keys."""
    # Sorted, so that no two claims deadlock.
    rows = [{"tenant": attempt.tenant, "key": key, "attempt": attempt.id} for key in sorted(keys)]
    connection.execute(insert_into(connection, claims).on_conflict_do_nothing(), rows)
    of_mine = (claims.c.tenant == attempt.tenant) & claims.c.key.in_(keys) & (claims.c.attempt == attempt.id)
    mine = set(connection.execute(sa.select(claims.c.key).where(of_mine)).scalars())
    # Read after the insert: the insert waits for other attempts' commits, so their answers are visible here.
    known = sa.select(answers.c.key).where(answers.c.tenant == attempt.tenant, answers.c.key.in_(mine))
    answered = set(connection.execute(known).scalars())
    let_go(connection, attempt, answered)
    return mine - answered


def let_go(connection: sa.Connection, attempt: Attempt, keys: Set[bytes]) -> None:
    if keys:
        mine = (claims.c.attempt == attempt.id) & (claims.c.tenant == attempt.tenant)
        connection.execute(claims.delete().where(mine, claims.c.key.in_(keys)))


def let_all_go(connection: sa.Connection, attempt: Attempt) -> None:
    connection.execute(claims.delete().where(claims.c.attempt == attempt.id))


def claimed(connection: sa.Connection, tenant: str, keys: Sequence[bytes]) -> set[bytes]:
    """The keys among these that some attempt has claimed."""
    theirs = (claims.c.tenant == tenant) & claims.c.key.in_(keys)
    return set(connection.execute(sa.select(claims.c.key).where(theirs)).scalars())


def silent_holders(since: float) -> sa.Select[Any]:
    """The running attempts that hold claims and have not reported since then (seconds of the epoch)."""
    running = (attempts.c.status == "running") & (attempts.c.seen_at < since)
    return sa.select(attempts).where(running, attempts.c.id.in_(sa.select(claims.c.attempt)))


def drop_claims(connection: sa.Connection) -> None:
    """Release the claims of attempts that do not run."""
    running = sa.select(attempts.c.id).where(attempts.c.status == "running")
    connection.execute(claims.delete().where(claims.c.attempt.not_in(running)))


def still_held(connection: sa.Connection, part: int, name: str) -> bool:
    """Whether the claim of this name still holds the part. A row lock keeps this true until the transaction ends."""
    c = parts.c
    held = sa.select(c.id).where(c.id == part, c.claim == name, c.status == "running")
    return connection.execute(held.with_for_update(read=True)).first() is not None
