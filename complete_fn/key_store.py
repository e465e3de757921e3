"""API keys: made, listed, revoked and checked. Only a hash of the secret half is kept."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal

import sqlalchemy as sa

from complete_fn.errors import InvalidOptionError, KeyRefusedError, ScopeError
from complete_fn.prices import nano
from complete_fn.service_tables import TABLES, api_keys, tenants
from complete_fn.store import Store
from complete_fn.tables import metadata

SCOPES = {
    "complete": "chat completions and completions",
    "jobs": "files, jobs and batches",
    "usage": "the tenant's lines of the ledger",
}
KEY = re.compile(r"cfn-([0-9a-f]{12})-([0-9a-f]{64})")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
NOBODY = hashlib.sha256(b"").digest()
REFUSED = (
    "The API key is missing, unknown or revoked. Send `Authorization: Bearer KEY`; `complete-fn keys create` makes one."
)


@dataclass(frozen=True, slots=True)
class Principal:
    """Who a request comes from."""

    tenant: str = "local"
    user: str = "local"
    scopes: frozenset[str] = frozenset(SCOPES)

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


class KeyStore:
    """The keys and tenants of one state file."""

    def __init__(self, store: Store) -> None:
        self.store = store
        with store.write() as connection:
            metadata.create_all(connection, tables=TABLES)

    def create(self, tenant: str, user: str, scopes: Sequence[str] = tuple(SCOPES)) -> str:
        """A new key; this is the only time that it can be read.

        Raises:
            InvalidOptionError: a name or scope that cannot be used.
        """
        if unknown := [s for s in scopes if s not in SCOPES]:
            raise InvalidOptionError(f"Scope {unknown[0]!r} is not one of {', '.join(SCOPES)}.")
        if bad := [n for n in (tenant, user) if not NAME.fullmatch(n)]:
            raise InvalidOptionError(f"Name {bad[0]!r} must be 1 to 64 letters, digits, dots, dashes, underscores.")
        name, secret = secrets.token_hex(6), secrets.token_hex(32)
        row = {
            "id": name,
            "tenant": tenant,
            "user": user,
            "digest": digest(secret),
            "scopes": ",".join(sorted(set(scopes))),
            "created_at": time.time(),
        }
        with self.store.write() as connection:
            connection.execute(api_keys.insert().values(row))
        return f"cfn-{name}-{secret}"

    def list(self) -> list[KeyLine]:
        columns = [api_keys.c[name] for name in KeyLine.__slots__]
        with self.store.read() as connection:
            return [KeyLine(*row) for row in connection.execute(sa.select(*columns).order_by(api_keys.c.created_at))]

    def revoke(self, name: str) -> bool:
        """Whether there was such a key, not yet revoked."""
        mine = (api_keys.c.id == name) & api_keys.c.revoked_at.is_(None)
        with self.store.write() as connection:
            return connection.execute(api_keys.update().where(mine).values(revoked_at=time.time())).rowcount > 0

    def any(self) -> bool:
        """Whether a key was ever made, revoked ones too: from then on nobody gets in without one."""
        with self.store.read() as connection:
            return connection.execute(sa.select(api_keys.c.id).limit(1)).first() is not None

    def check(self, key: str) -> Principal:
        """The owner of a key. An unknown id takes the same comparison as a wrong secret.

        Raises:
            KeyRefusedError: no such key.
        """
        match = KEY.fullmatch(key)
        name, secret = match.groups() if match else ("", "")
        valid = (api_keys.c.id == name) & api_keys.c.revoked_at.is_(None)
        with self.store.read() as connection:
            row = connection.execute(sa.select(api_keys).where(valid)).first()
        expected = NOBODY if row is None else row.digest
        if not hmac.compare_digest(expected, digest(secret)) or row is None:
            raise KeyRefusedError(REFUSED)
        return Principal(row.tenant, row.user, frozenset(row.scopes.split(",")))

    def set_daily_budget(self, tenant: str, limit: Decimal | None) -> None:
        with self.store.write() as connection:
            connection.execute(tenants.delete().where(tenants.c.name == tenant))
            if limit is not None:
                connection.execute(tenants.insert().values(name=tenant, daily_nano=nano(limit)))

    def daily_nano(self, tenant: str) -> int | None:
        with self.store.read() as connection:
            return connection.execute(sa.select(tenants.c.daily_nano).where(tenants.c.name == tenant)).scalar()


def digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()
