"""`KeyStore` makes, lists, revokes and checks API keys. It keeps only a hash of a key's secret half."""

from __future__ import annotations

import hashlib
import hmac
import math
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal

import sqlalchemy as sa

from complete_fn.engines.prices import nano
from complete_fn.errors import InvalidOptionError, KeyRefusedError, ScopeError
from complete_fn.store.job_tables import api_keys, daily_budgets, tenants
from complete_fn.store.store import Store
from complete_fn.store.transactions import retried, upsert

SCOPES = {
    "complete": "chat completions and completions",
    "jobs": "files, jobs and batches",
    "usage": "the tenant's lines of the ledger",
    "metrics": "/metrics, sums over all tenants",
}
USUAL = ("complete", "jobs", "usage")
KEY = re.compile(r"cfn-([0-9a-f]{12})-([0-9a-f]{64})")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
DAY, MOST_DAYS = 86_400.0, 36_500
NOBODY = hashlib.sha256(b"").digest()
REFUSED = (
    "The API key is missing, unknown, expired or revoked. Send `Authorization: Bearer KEY`; "
    "`complete-fn keys create` makes one."
)


@dataclass(frozen=True, slots=True)
class Principal:
    """The tenant and user of a request, by its key, and the tokens that tenant and key may use in a minute."""

    tenant: str = "local"
    user: str = "local"
    scopes: frozenset[str] = frozenset(SCOPES)
    key: str = ""
    tenant_tokens: int | None = None
    key_tokens: int | None = None

    def require(self, scope: str) -> None:
        """Raises:
        ScopeError: the key was made without this scope.
        """
        if scope not in self.scopes:
            raise ScopeError(f"This API key has not the scope {scope!r} ({SCOPES[scope]}). Make one that has it.")


@dataclass(frozen=True, slots=True)
class KeyLine:
    """A key as it is listed: everything but its secret."""

    id: str
    tenant: str
    user: str
    scopes: str
    created_at: float
    revoked_at: float | None
    tokens_per_minute: int | None
    expires_at: float | None


class KeyStore:
    """The keys and tenants of one state file."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def create(self, tenant: str, user: str, scopes: Sequence[str] = USUAL, days: float | None = None) -> str:
        """Make a key. Only this call returns it: the store has no copy of its secret.

        Args:
            days: Its use ends after so many; None sets no end.

        Raises:
            InvalidOptionError: a name, scope or number of days that cannot be used.
        """
        if days is not None and not 0 < days <= MOST_DAYS:
            raise InvalidOptionError(f"days = {days!r} must be a number above 0, at most {MOST_DAYS:,}.")
        if unknown := [s for s in scopes if s not in SCOPES]:
            raise InvalidOptionError(f"Scope {unknown[0]!r} is not one of {', '.join(SCOPES)}.")
        if bad := [n for n in (tenant, user) if not NAME.fullmatch(n)]:
            raise InvalidOptionError(f"Name {bad[0]!r} must be 1 to 64 letters, digits, dots, dashes, underscores.")
        name, secret, now = secrets.token_hex(6), secrets.token_hex(32), self.store.now()
        row = {
            "id": name,
            "tenant": tenant,
            "user": user,
            "digest": digest(secret),
            "scopes": ",".join(sorted(set(scopes))),
            "created_at": now,
            "expires_at": None if days is None else now + days * DAY,
        }
        with self.store.write() as connection:
            connection.execute(api_keys.insert().values(row))
        return f"cfn-{name}-{secret}"

    @retried
    def list(self) -> list[KeyLine]:
        columns = [api_keys.c[name] for name in KeyLine.__slots__]
        with self.store.read() as connection:
            return [KeyLine(*row) for row in connection.execute(sa.select(*columns).order_by(api_keys.c.created_at))]

    def revoke(self, name: str) -> bool:
        """Revoke a key; False if no such key exists, or if it was revoked before."""
        mine = (api_keys.c.id == name) & api_keys.c.revoked_at.is_(None)
        with self.store.write() as connection:
            return connection.execute(api_keys.update().where(mine).values(revoked_at=self.store.now())).rowcount > 0

    @retried
    def any(self) -> bool:
        """Whether a key was ever made, revoked keys included. If so, every request needs a key."""
        with self.store.read() as connection:
            return connection.execute(sa.select(api_keys.c.id).limit(1)).first() is not None

    @retried
    def check(self, key: str) -> Principal:
        """The owner of a key. An unknown id takes the same comparison as a wrong secret.

        Raises:
            KeyRefusedError: no such key, or its use has ended.
        """
        match = KEY.fullmatch(key)
        name, secret = match.groups() if match else ("", "")
        is_young = api_keys.c.expires_at.is_(None) | (api_keys.c.expires_at > self.store.now())
        valid = (api_keys.c.id == name) & api_keys.c.revoked_at.is_(None) & is_young
        limit = sa.select(tenants.c.tokens_per_minute).where(tenants.c.name == api_keys.c.tenant).scalar_subquery()
        with self.store.read() as connection:
            row = connection.execute(sa.select(api_keys, limit.label("tenant_tokens")).where(valid)).first()
        expected = NOBODY if row is None else row.digest
        if not hmac.compare_digest(expected, digest(secret)) or row is None:
            raise KeyRefusedError(REFUSED)
        scopes = frozenset(row.scopes.split(","))
        return Principal(row.tenant, row.user, scopes, row.id, row.tenant_tokens, row.tokens_per_minute)

    @retried
    def limit_key(self, name: str, per_minute: int | None) -> bool:
        """Bound the tokens that a key may use in a minute; whether there is such a key."""
        change = api_keys.update().where(api_keys.c.id == name).values(tokens_per_minute=per_minute)
        with self.store.write() as connection:
            return connection.execute(change).rowcount > 0

    @retried
    def limit_tenant(self, tenant: str, per_minute: int | None) -> None:
        self.set_of_tenant(tenant, tokens_per_minute=per_minute)

    @retried
    def set_daily_budget(self, tenant: str, limit: Decimal | None, currency: str = "USD") -> None:
        """Bound what the tenant may spend in a day in one currency; None sets no bound."""
        row = {"tenant": tenant, "currency": currency}
        with self.store.write() as connection:
            if limit is None:
                connection.execute(daily_budgets.delete().filter_by(**row))
            else:
                upsert(connection, daily_budgets, ("tenant", "currency"), [{**row, "nano": nano(limit)}])

    def set_storage(self, tenant: str, most: int | None) -> None:
        """The bytes that the tenant may keep; None sets the service's usual number."""
        self.set_of_tenant(tenant, storage_bytes=most)

    def set_weight(self, tenant: str, weight: float) -> None:
        """The tenant's share of the workers, as a multiple of other tenants'.

        Raises:
            InvalidOptionError: not a number above 0.
        """
        if not 0 < weight < math.inf:
            raise InvalidOptionError(f"Weight {weight!r} must be a number above 0; others have 1.")
        self.set_of_tenant(tenant, weight=weight)

    @retried
    def set_of_tenant(self, tenant: str, /, **values: float | None) -> None:
        with self.store.write() as connection:
            upsert(connection, tenants, ("name",), [{"name": tenant, **values}])

    @retried
    def daily_budgets(self, tenant: str) -> dict[str, int]:
        """The tenant's bounds on a day's spending by currency, in 1e-9 of it."""
        chosen = sa.select(daily_budgets.c.currency, daily_budgets.c.nano).where(daily_budgets.c.tenant == tenant)
        with self.store.read() as connection:
            return {row.currency: row.nano for row in connection.execute(chosen)}


def digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()
