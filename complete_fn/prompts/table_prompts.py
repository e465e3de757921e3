"""A table's rows become prompts, window by window. Prompts are counted before they are made, so memory stays bounded.

A template multiplies what it is given: its own text by the rows, a long field by the times that it is named.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc

from complete_fn.errors import TooLargeError
from complete_fn.prompts.fields import instruction_of, packed_head
from complete_fn.prompts.templates import parse_template, render_column
from complete_fn.text import as_text

MIB = 1024 * 1024
PROMPT_BYTES = 4 * MIB  # of one prompt: 32 for each token of 131,072, the longest context of the catalogue
WINDOW_PROMPT_BYTES = 4_096 * MIB  # of a window's prompts; a window has fewer rows where the template is long
ESTIMATE_PROMPT_BYTES = 4_096 * MIB  # of a table's prompts where all of them are held at the same time
SHORTER = "Shorten the template, or cut long columns before."


class HasColumns(Protocol):
    """Rows of a table."""

    @property
    def count(self) -> int: ...
    def columns(self, names: Iterable[str]) -> dict[str, Any]: ...


@dataclass
class TablePrompts:
    """Makes the prompts of a table by one template.

    Attributes:
        most: The most bytes of all prompts together; None for no bound.
        remedy: What a caller can do whose table has more.
        rows: The rows so far.
        bytes: The bytes of their prompts.

    Raises:
        TooLargeError: The template alone has more bytes than a prompt may have.
    """

    template: str
    reorder_fields: bool = False
    most: int | None = None
    remedy: str = ""
    rows: int = 0
    bytes: int = 0
    own_bytes: int = field(init=False)
    mentions: Counter[str] = field(init=False)

    def __post_init__(self) -> None:
        pieces = parse_template(self.template)
        self.mentions = Counter(name for _, name in pieces if name is not None)
        if self.reorder_fields:
            self.own_bytes = len(packed_head(*instruction_of(pieces)).encode())
            self.mentions = Counter(dict.fromkeys(self.mentions, 1))
        else:
            self.own_bytes = sum(len(text.encode("utf-8", "surrogatepass")) for text, _ in pieces)
        if self.own_bytes > PROMPT_BYTES:
            raise TooLargeError(
                f"The template has {self.own_bytes:,} bytes; a prompt has at most {PROMPT_BYTES:,}. Shorten it."
            )

    @property
    def most_mentions(self) -> int:
        """How often the template names the column that it names most."""
        return max(self.mentions.values(), default=0)

    def may_exceed(self, rows: int, table_bytes: int) -> bool:
        """Whether the prompts of a table of at most so many rows and bytes may have more bytes than are taken."""
        return self.most is not None and rows * self.own_bytes + table_bytes * self.most_mentions > self.most

    def of(self, rows: HasColumns) -> pa.ChunkedArray:
        """The prompts of the next rows, as `render_column` makes them.

        Raises:
            TooLargeError: A prompt, those of the window or those of the table so far have more bytes than are taken.
        """
        columns = rows.columns(self.mentions)
        self.count_bytes(rows.count, columns)
        return render_column(self.template, columns, rows.count, self.reorder_fields)

    def count_bytes(self, rows: int, columns: Mapping[str, Any]) -> None:
        """Count the prompts of the next rows, and refuse as `of` does."""
        sizes = self.sizes(rows, columns)
        longest = pc.max(sizes).as_py() or 0
        if longest > PROMPT_BYTES:
            number = self.rows + pc.index(sizes, longest).as_py() + 1
            raise TooLargeError(
                f"The prompt of row {number:,} would have {longest:,} bytes; at most {PROMPT_BYTES:,} are taken. "
                f"{SHORTER}"
            )
        window = pc.sum(sizes).as_py() or 0
        if window > WINDOW_PROMPT_BYTES:
            raise TooLargeError(
                f"The prompts of rows {self.rows + 1:,} to {self.rows + rows:,} would have {window:,} bytes; at most "
                f"{WINDOW_PROMPT_BYTES:,} are taken at a time. {SHORTER}"
            )
        self.rows, self.bytes = self.rows + rows, self.bytes + window
        if self.most is not None and self.bytes > self.most:
            raise TooLargeError(
                f"The prompts of the first {self.rows:,} rows would have {self.bytes:,} bytes; at most {self.most:,} "
                f"are taken. {self.remedy}"
            )

    def sizes(self, rows: int, columns: Mapping[str, Any]) -> Any:
        """[rows] The bytes of each prompt; NULL for a NULL prompt."""
        found: Any = pa.repeat(pa.scalar(self.own_bytes, pa.int64()), rows)
        for name, times in self.mentions.items():
            found = pc.add(found, pc.multiply(text_bytes(columns[name], name), times))
        return found


def text_bytes(column: Any, name: str) -> Any:
    """The bytes of each value's text. The dictionary of a column is measured without being decoded."""
    if not pa.types.is_dictionary(column.type):
        return pc.binary_length(as_text(column, name))
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    lengths = [pc.binary_length(as_text(chunk.dictionary, name)).take(chunk.indices) for chunk in chunks]
    return pa.chunked_array(lengths, pa.int64())
