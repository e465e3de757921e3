"""A job's rows come from an uploaded file, a URI under an allowed root, or SQL on a registered connection."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from complete_fn.errors import InputError
from complete_fn.rows.allowed_paths import allowed
from complete_fn.rows.databases import Query, QuerySource
from complete_fn.rows.formats import place_of
from complete_fn.rows.readers import FileSource
from complete_fn.service.state import ServiceState

LONGEST_SQL = 65_536  # characters


def open_source(state: ServiceState, tenant: str, asked: Mapping[str, Any]) -> FileSource | QuerySource:
    """The source that a request names.

    Args:
        asked: A mapping with `file_id`, or `uri`, or `connection` and `sql`.

    Raises:
        RequestError: The tenant has no such source, or may not read it.
    """
    limits = state.limits.of_tables
    if "file_id" in asked:
        upload = state.uploads.get(tenant, asked["file_id"])
        return state.uploads.source(upload, limits)
    if "uri" in asked:
        place = place_of(asked["uri"])
        found = allowed(asked["uri"], state.settings.sources, tenant, "read")
        return FileSource(
            repr(asked["uri"]),
            place.format,
            found.reading,
            place.compression,
            limits,
        )
    connection = state.connections.get(tenant, asked["connection"])
    sql = one_select(asked["sql"])
    reader = state.connections.reader(connection, state.settings.sql_seconds)
    return QuerySource(reader, Query(sql), limits)


def one_select(sql: str) -> str:
    """The tenant's SELECT inside of `SELECT * FROM (...)`, so that it can only read.

    No database takes a statement that writes, an INTO OUTFILE or a WITH that deletes inside of FROM (...). The
    tenant's text must not close our parenthesis. So comments and backslashes are refused, and quotes and parentheses
    must be in pairs.

    Raises:
        InputError: The text is not one plain SELECT.
    """
    text = sql.strip().rstrip(";").strip()
    if len(text) > LONGEST_SQL:
        raise InputError(f"The SQL has {len(text):,} characters; {LONGEST_SQL:,} are taken.")
    if (text.split(None, 1) or [""])[0].upper().partition("(")[0] not in ("SELECT", "WITH", "VALUES"):
        raise InputError("The SQL must be one SELECT (or WITH ... SELECT, or VALUES).")
    depth, quote = 0, ""
    for place, character in enumerate(text):
        if character in "\\`\0" or (character == "$" and not quote):
            raise InputError(f"The SQL has {character!r} at character {place}, which is not taken here.")
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character == ";" or character == "#" or text[place : place + 2] in ("--", "/*"):
            raise InputError(f"The SQL has {character!r} at character {place}: one statement, no comments.")
        elif character in "()":
            depth += 1 if character == "(" else -1
            if depth < 0:
                break
    if depth or quote:
        raise InputError("The SQL has a quote or parenthesis without its other half.")
    return f"SELECT * FROM ({text}\n) AS rows_of_job"
