"""Names of tables and columns in SQL: always in quotes, in those of the database, and never out of them."""

from __future__ import annotations

import sqlite3

import pytest

from complete_fn.rows.identifiers import quote_name, quote_table


@pytest.mark.parametrize("name", ["order", "Order", "a b", 'a"b', "a`b", "a;b--", "ä", "%s"])
def test_a_quoted_name_is_that_name_and_nothing_else(name: str) -> None:
    made = sqlite3.connect(":memory:").execute(f"SELECT 1 AS {quote_name(name)}")
    assert made.description[0][0] == name


def test_mysql_has_marks_of_its_own() -> None:
    assert quote_name('a`b"c', "mysql") == '`a``b"c`'
    assert quote_name('a`b"c', "postgresql") == '"a`b""c"'


def test_each_part_of_a_tables_name_is_quoted_by_itself() -> None:
    assert quote_table("user.order") == '"user"."order"'
    assert quote_table("order", "mysql") == "`order`"
