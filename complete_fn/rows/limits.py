"""Bounds of a table that a stranger sends. They are checked while the table is read, so that nothing larger is held."""

from __future__ import annotations

from dataclasses import dataclass

from complete_fn.errors import TooLargeError


@dataclass(frozen=True, slots=True)
class TableLimits:
    """The most rows, decoded bytes and columns that are taken; None for no bound.

    Each method raises TooLargeError where `what`, a table by its name in messages, has more than that.
    """

    rows: int | None = None
    bytes: int | None = None
    columns: int | None = None

    def refuse_rows(self, count: int, what: str) -> None:
        if self.rows is not None and count > self.rows:
            raise TooLargeError(f"{what} has more rows than the {self.rows:,} that are taken.")

    def refuse_bytes(self, count: int, what: str) -> None:
        if self.bytes is not None and count > self.bytes:
            raise TooLargeError(f"{what} decodes to more than the {self.bytes:,} bytes that are taken.")

    def refuse_columns(self, count: int, what: str) -> None:
        if self.columns is not None and count > self.columns:
            raise TooLargeError(f"{what} has more columns than the {self.columns:,} that are taken.")


NO_LIMITS = TableLimits()
