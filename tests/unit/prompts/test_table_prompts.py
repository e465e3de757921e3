"""Prompts of a table are counted before they are made; what is too large is refused with its bound and a remedy."""

from __future__ import annotations

import pyarrow as pa
import pytest

from complete_fn.errors import InvalidOptionError, TooLargeError
from complete_fn.prompts import table_prompts
from complete_fn.prompts.table_prompts import PROMPT_BYTES, TablePrompts
from complete_fn.prompts.templates import MOST_FIELDS
from complete_fn.rows.formats import LineRows, TableRows

WORDS = ["one", None, "zwölf", "🦀"]
TABLE = pa.table(
    {
        "text": WORDS,
        "n": [1, 22, None, 4444],
        "kind": pa.array(WORDS).dictionary_encode(),
        "parts": pa.chunked_array([["a", "bb"], ["ccc", None]]),
    }
)
LONG = TableRows(pa.table({"text": ["short", "x" * (10 * 1024 * 1024)]}))


@pytest.mark.parametrize(
    "template", ["é {text}", "{n}{text}{n}", "{kind}: {parts} {{}}", "{kind}{kind}", "{n} of {parts}"]
)
@pytest.mark.parametrize("reorder_fields", [False, True])
def test_what_is_counted_is_what_is_made(template: str, reorder_fields: bool) -> None:
    made = TablePrompts(template, reorder_fields)
    found = made.of(TableRows(TABLE)).to_pylist()
    assert made.rows == len(found)
    actual = sum(len(prompt.encode()) for prompt in found if prompt is not None)
    lengths = 16 * len(found) if reorder_fields else 0  # the packed form has each field's length too
    assert actual - lengths <= made.bytes <= actual


def test_lines_are_counted_as_tables_are() -> None:
    made = TablePrompts("{text}{more}")
    made.of(LineRows([b'{"text": "one", "more": [1, 2]}', b'{"text": "two"}']))
    assert made.bytes == len("one[1, 2]")


def test_a_template_without_fields_counts_for_every_row() -> None:
    made = TablePrompts("always")
    made.of(TableRows(TABLE))
    assert made.bytes == 6 * 4


@pytest.mark.parametrize("template", ["{text}" * MOST_FIELDS, "{text}"])
def test_a_prompt_that_is_too_long_is_refused_before_it_is_made(template: str) -> None:
    pool = pa.default_memory_pool()
    before = max(pool.max_memory(), pool.bytes_allocated() + 64 * 1024 * 1024)
    with pytest.raises(
        TooLargeError, match=rf"row 2 would have .* at most {PROMPT_BYTES:,} are taken\. Shorten"
    ) as caught:
        TablePrompts(template).of(LONG)
    assert "xxx" not in str(caught.value)
    assert pool.max_memory() <= before


def test_rows_are_numbered_through_all_windows() -> None:
    made = TablePrompts("{text}")
    made.of(TableRows(TABLE))
    with pytest.raises(TooLargeError, match="row 6 would have"):
        made.of(LONG)


def test_a_long_value_in_a_dictionary_is_measured_without_being_repeated() -> None:
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 100_000, pa.int32()), ["x" * 1_000_000])
    with pytest.raises(TooLargeError, match="of rows 1 to 100,000 would have 100,000,000,000 bytes"):
        TablePrompts("{text}").of(TableRows(pa.table({"text": column})))


def test_a_template_that_is_too_long_by_itself_is_refused_without_rows() -> None:
    with pytest.raises(TooLargeError, match=rf"has 4,194,305 bytes; a prompt has at most {PROMPT_BYTES:,}"):
        TablePrompts("x" * (PROMPT_BYTES + 1))
    TablePrompts("x" * PROMPT_BYTES)


def test_a_template_of_too_many_fields_is_refused() -> None:
    with pytest.raises(InvalidOptionError, match="more than 1,000 fields"):
        TablePrompts("{text}" * (MOST_FIELDS + 1))


def test_all_prompts_together_have_a_bound_with_a_remedy() -> None:
    made = TablePrompts("{parts}", most=9, remedy="Take fewer rows.")
    made.of(TableRows(TABLE))
    with pytest.raises(TooLargeError, match=r"first 8 rows would have 12 bytes; at most 9 are taken\. Take fewer rows"):
        made.of(TableRows(TABLE))


def test_a_windows_prompts_have_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_prompts, "WINDOW_PROMPT_BYTES", 5)
    with pytest.raises(TooLargeError, match="rows 1 to 4 would have 6 bytes; at most 5"):
        TablePrompts("{parts}").of(TableRows(TABLE))
