"""Names of tables and columns in SQL. They are written in quotes, so a reserved word is a name like any other."""

from __future__ import annotations

MARKS = {"mysql": "`"}  # by family of databases; the others quote names as the standard does


def quote_name(name: str, family: str = "") -> str:
    """One name, as the databases of the family quote it."""
    mark = MARKS.get(family, '"')
    return mark + name.replace(mark, mark * 2) + mark


def quote_table(table: str, family: str = "") -> str:
    """A table's name, with its schema in front if it has one."""
    return ".".join(quote_name(part, family) for part in table.split("."))
