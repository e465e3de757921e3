"""A result table holds answers in a user's database: one row for each source row, under its key, written by upsert."""

from __future__ import annotations

import hashlib
import re
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import sqlalchemy as sa
from sqlalchemy.dialects import mysql, postgresql, sqlite

from complete_fn.errors import InputError
from complete_fn.text import encode_text

NAME = re.compile(r"[^\W\d]\w{0,62}(\.[^\W\d]\w{0,62})?")


def refuse_name(table: str) -> str:
    """Raises:
    InputError: The text is neither a plain name nor a name with its schema in front.
    """
    if not NAME.fullmatch(table):
        raise InputError(
            f"{table!r} is no name of a table: take letters, digits and _, with a schema in front if need be."
        )
    return table


def refuse_keys(column: Any, name: str, longest: int | None = None) -> None:
    """Raises:
    InputError: The column does not identify rows: a key is NULL, comes twice, is too long or of another type.
    """
    if column.null_count:
        raise InputError(f"The key {name!r} is NULL in {column.null_count:,} rows: no answer can be written under it.")
    if pa.types.is_floating(column.type) or pa.types.is_nested(column.type):
        raise InputError(f"The key {name!r} is {column.type}; take a column of whole numbers, text or dates.")
    counts = pc.value_counts(column)
    if len(counts) < len(column):
        twice = counts.field("values")[pc.index(pc.greater(counts.field("counts"), 1), True).as_py()]
        raise InputError(f"The key {name!r} has the value {twice.as_py()!r} more than once.")
    if longest is not None and (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        most = pc.max(pc.utf8_length(column)).as_py()
        if most is not None and most > longest:
            raise InputError(
                f"The key {name!r} has a value of {most:,} characters; this database's keys take {longest}."
            )


class KeysSeen:
    """The keys of all windows so far, as 64-bit hashes. A key that came twice would overwrite an answer.

    Args:
        longest: the most characters of a key that is text.
    """

    def __init__(self, longest: int | None = None) -> None:
        self.longest = longest
        self.seen = np.empty(0, np.uint64)  # sorted

    def add(self, column: Any, name: str) -> None:
        """Raises:
        InputError: The window's keys do not identify its rows, or an earlier window has one of the keys.
        """
        refuse_keys(column, name, self.longest)
        fresh = hashes(column)
        places = np.minimum(np.searchsorted(self.seen, fresh), max(0, len(self.seen) - 1))
        if len(self.seen) and (again := np.flatnonzero(self.seen[places] == fresh)).size:
            raise InputError(f"The key {name!r} has the value {column[int(again[0])].as_py()!r} more than once.")
        self.seen = np.sort(np.concatenate([self.seen, fresh]), kind="stable")


def hashes(column: Any) -> np.ndarray[Any, np.dtype[np.uint64]]:
    if pa.types.is_integer(column.type):
        return np.asarray(column.to_numpy()).astype(np.uint64)
    texts = (encode_text(str(value)) for value in column.to_pylist())
    eight = (hashlib.blake2b(text, digest_size=8).digest() for text in texts)
    return np.frombuffer(b"".join(eight), np.uint64)


def result_names(column: str, with_details: bool) -> list[str]:
    return [column, *(f"{column}_{name}" for name in DETAIL_PATHS if with_details)]


def result_columns(column: str, new: Any, with_details: bool) -> dict[str, Any]:
    """The answers and, if asked for, their details as flat columns of a table.

    Args:
        new: the columns `column` and, with details, `column`_details.
    """
    found = {column: new[column]}
    if not with_details:
        return found
    details = new[f"{column}_details"]
    whole = details.combine_chunks() if isinstance(details, pa.ChunkedArray) else details
    for name, path in DETAIL_PATHS.items():
        found[f"{column}_{name}"] = pc.struct_field(whole, path)
    return found


DETAIL_PATHS = {
    "error": ["error", "code"],
    "error_message": ["error", "message"],
    "finish_reason": ["finish_reason"],
    "prompt_tokens": ["usage", "prompt_tokens"],
    "cached_tokens": ["usage", "cached_tokens"],
    "completion_tokens": ["usage", "completion_tokens"],
    "cost": ["cost"],
    "source": ["source"],
}


def result_table(connection: sa.Connection, name: str, key: str, schema: Any) -> sa.Table:
    """The table, which is created if it does not exist.

    Raises:
        InputError: The table exists and lacks a column, or the key is neither its primary key nor unique.
    """
    namespace, _, bare = refuse_name(name).rpartition(".")
    dialect = connection.dialect
    columns = [
        sa.Column(f.name, column_type(f.type, dialect, f.name == key), primary_key=f.name == key, autoincrement=False)
        for f in schema
    ]
    table = sa.Table(
        bare, sa.MetaData(schema=namespace or None), *columns, mysql_charset="utf8mb4", mariadb_charset="utf8mb4"
    )
    inspector = sa.inspect(connection)
    if not inspector.has_table(bare, schema=namespace or None):
        table.create(connection, checkfirst=True)
        return table
    there = {c["name"] for c in inspector.get_columns(bare, schema=namespace or None)}
    if missing := [f.name for f in schema if f.name not in there]:
        raise InputError(f"The table {name!r} is there and has no column {missing[0]!r}. Name another, or drop it.")
    unique = [u["column_names"] for u in inspector.get_unique_constraints(bare, schema=namespace or None)]
    primary = inspector.get_pk_constraint(bare, schema=namespace or None)["constrained_columns"]
    if [key] not in [primary, *unique]:
        raise InputError(f"The table {name!r} is there and {key!r} is not its primary key. Name another, or drop it.")
    return table


def column_type(kind: Any, dialect: sa.Dialect, is_key: bool) -> Any:
    """The database's type for an Arrow type."""
    of = pa.types
    if of.is_boolean(kind):
        return sa.Boolean()
    if of.is_integer(kind):
        return sa.BigInteger()
    if of.is_floating(kind):
        return sa.Double()
    if of.is_decimal(kind):
        return sa.Numeric(kind.precision, kind.scale)
    if of.is_date(kind):
        return sa.Date()
    if of.is_timestamp(kind):
        return mysql.DATETIME(fsp=6) if dialect.name in ("mysql", "mariadb") else sa.DateTime(kind.tz is not None)
    if dialect.name not in ("mysql", "mariadb"):
        return sa.Text()
    # By the usual collations 'a', 'A' and 'a ' would be the same key.
    collation = "utf8mb4_nopad_bin" if is_mariadb(dialect) else "utf8mb4_0900_bin"
    return sa.String(255, collation) if is_key else mysql.LONGTEXT()


def is_mariadb(dialect: sa.Dialect) -> bool:
    """Whether the server is MariaDB, whatever the URL says: the dialect asks the server when it connects."""
    return bool(getattr(dialect, "is_mariadb", False))


def upserting(table: sa.Table, key: str, dialect: str) -> Any:
    """An INSERT that replaces the row with the same key."""
    others = [c.name for c in table.columns if c.name != key]
    if dialect in ("mysql", "mariadb"):
        insert = mysql.insert(table)
        return insert.on_duplicate_key_update({name: insert.inserted[name] for name in others})
    made: Any = (postgresql if dialect == "postgresql" else sqlite).insert(table)
    return made.on_conflict_do_update(index_elements=[key], set_={name: made.excluded[name] for name in others})
