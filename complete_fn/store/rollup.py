"""The rollup has the ledger's sums by hour. Each line is added to it in the transaction that writes the line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import sqlalchemy as sa

from complete_fn.store.tables import ledger_hours
from complete_fn.store.transactions import insert_in

HOUR = 3600  # seconds
GROUPED = ("tenant", "user", "job", "query_tag", "model", "price_class", "engine", "currency", "basis")
SUMMED = ("rows", "tokens", "cost_nano", "saved_nano", "device_us", "saved_us")


def hour_of(at: float) -> int:
    """The first second of the hour of a time."""
    return int(at // HOUR) * HOUR


def add_to_hours(connection: sa.Connection, lines: Iterable[Mapping[str, Any]]) -> None:
    """Add new lines of the ledger to the sums of their hours, in the order of the keys, so that no commits deadlock."""
    sums: dict[tuple[Any, ...], list[int]] = {}
    for line in lines:
        group = (hour_of(line["at"]), *(line[name] for name in GROUPED))
        so_far = sums.setdefault(group, [0] * len(SUMMED))
        sums[group] = [had + line[name] for had, name in zip(so_far, SUMMED, strict=True)]
    rows = [
        {"key": key_of(group), **dict(zip(("hour", *GROUPED, *SUMMED), (*group, *values), strict=True))}
        for group, values in sums.items()
    ]
    connection.execute(add_statement(connection.dialect.name), sorted(rows, key=lambda row: row["key"]))


@cache
def add_statement(dialect: str) -> Any:
    """Made once, because making it takes longer than executing it."""
    insert = insert_in(dialect, ledger_hours)
    more = {name: ledger_hours.c[name] + insert.excluded[name] for name in SUMMED}
    return insert.on_conflict_do_update(index_elements=["key"], set_=more)


def key_of(group: tuple[Any, ...]) -> bytes:
    return hashlib.blake2b(json.dumps(group).encode(), digest_size=16).digest()
