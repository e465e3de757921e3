"""`StorageQuota` bounds the bytes that a tenant keeps in the service: files, jobs with their results, call-outs.

The sizes are in the store's rows, so nothing lists the storage. Results are counted and never refused, because they are
paid for: what they take beyond the quota keeps the tenant from sending more.
"""

from __future__ import annotations

import time

import sqlalchemy as sa

from complete_fn.errors import StorageFullError
from complete_fn.store.job_tables import call_outs, files, jobs, tenants
from complete_fn.store.store import Store
from complete_fn.store.tables import summed
from complete_fn.store.transactions import retried, upsert

LOOK_SECONDS = 5.0  # call-outs come often: for them, the sums are read again after so long
FULL = (
    "Storage of tenant {0!r}: {1:,} bytes are used, {2:,} more are needed, {3:,} are allowed. Delete files "
    "(DELETE /v1/files/ID), or jobs and batches that are over (DELETE /v1/jobs/ID, /v1/batches/ID)."
)


class StorageQuota:
    """The quotas of one store's tenants.

    Args:
        usual: The bytes of a tenant for which `complete-fn keys storage` has set no other number.
    """

    def __init__(self, store: Store, usual: int) -> None:
        self.store, self.usual = store, usual
        self.looked: dict[str, tuple[float, int]] = {}  # by tenant: when, and the bytes that were left

    @retried
    def state(self, tenant: str) -> tuple[int, int]:
        """(the bytes that the tenant uses, the bytes that it may use)"""
        with self.store.read() as connection:
            return self.state_in(connection, tenant)

    def state_in(self, connection: sa.Connection, tenant: str) -> tuple[int, int]:
        lengths = [sa.func.coalesce(sa.func.length(column), 0) for column in (call_outs.c.asked, call_outs.c.reply)]
        kept = (
            sa.select(summed(files.c.bytes)).where(files.c.tenant == tenant),
            sa.select(summed(jobs.c.bytes)).where(jobs.c.tenant == tenant),
            sa.select(summed(lengths[0] + lengths[1])).where(call_outs.c.tenant == tenant),
            sa.select(tenants.c.storage_bytes).where(tenants.c.name == tenant),
        )
        *sizes, own = connection.execute(sa.select(*(each.scalar_subquery() for each in kept))).one()
        return sum(map(int, sizes)), self.usual if own is None else int(own)

    def refuse(self, tenant: str, more: int) -> None:
        """Refuse bytes that are not in the store yet. Others may be written at the same time: see `refuse_excess`.

        Raises:
            StorageFullError: The tenant may not keep so many bytes more.
        """
        used, allowed = self.state(tenant)
        if used + more > allowed:
            raise full(tenant, used, more, allowed)

    def refuse_excess(self, connection: sa.Connection, tenant: str, added: int) -> None:
        """Refuse bytes that this transaction has added. Transactions of one tenant do this one after the other.

        Raises:
            StorageFullError: The tenant may not keep so many bytes more. The transaction must be rolled back.
        """
        upsert(connection, tenants, ("name",), [{"name": tenant}])
        mine = sa.select(tenants.c.name).where(tenants.c.name == tenant).with_for_update()
        connection.execute(mine)
        used, allowed = self.state_in(connection, tenant)
        if used > allowed:
            raise full(tenant, used - added, added, allowed)

    def refuse_roughly(self, tenant: str, more: int) -> None:
        """`refuse`, by sums of up to `LOOK_SECONDS` ago."""
        at, left = self.looked.get(tenant, (-LOOK_SECONDS, 0))
        if time.monotonic() - at >= LOOK_SECONDS:
            used, allowed = self.state(tenant)
            self.looked[tenant] = time.monotonic(), allowed - used
            left = allowed - used
        if more > left:
            self.refuse(tenant, more)


def full(tenant: str, used: int, more: int, allowed: int) -> StorageFullError:
    return StorageFullError(FULL.format(tenant, used, more, allowed))
