"""Claims: an answer that several runs ask for at the same time is computed by one of them. Inside transactions.

An attempt claims keys as it hands their prompts to the engine, and lets them go with the slice that holds their
answers, or at its end. So it never waits while it holds a claim that it is not working on, and no two runs can wait
for each other.
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
    """Those of the keys that nobody has answered and nobody else is computing: they are the attempt's now."""
    rows = [{"tenant": attempt.tenant, "key": key, "attempt": attempt.id} for key in sorted(keys)]  # no deadlock
    connection.execute(insert_into(connection, claims).on_conflict_do_nothing(), rows)
    of_mine = (claims.c.tenant == attempt.tenant) & claims.c.key.in_(keys) & (claims.c.attempt == attempt.id)
    mine = set(connection.execute(sa.select(claims.c.key).where(of_mine)).scalars())
    # After the insert, which waited for the commits of others: what they answered can be seen.
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
    """Those of the keys that somebody is computing."""
    theirs = (claims.c.tenant == tenant) & claims.c.key.in_(keys)
    return set(connection.execute(sa.select(claims.c.key).where(theirs)).scalars())


def silent_holders(since: float) -> sa.Select[Any]:
    """The running attempts that hold claims and that nobody has heard of since then (seconds of the epoch)."""
    running = (attempts.c.status == "running") & (attempts.c.seen_at < since)
    return sa.select(attempts).where(running, attempts.c.id.in_(sa.select(claims.c.attempt)))


def drop_claims(connection: sa.Connection) -> None:
    """Let go what attempts claimed that do not run."""
    running = sa.select(attempts.c.id).where(attempts.c.status == "running")
    connection.execute(claims.delete().where(claims.c.attempt.not_in(running)))


def still_held(connection: sa.Connection, part: int, fence: int) -> bool:
    """Whether a job's part is leased by the claim of that fence; it stays so until the transaction's end."""
    c = parts.c
    held = sa.select(c.id).where(c.id == part, c.fence == fence, c.status == "running")
    return connection.execute(held.with_for_update(read=True)).first() is not None
