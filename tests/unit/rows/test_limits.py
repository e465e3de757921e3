"""Bounds of strangers' tables hold for every format, and wide tables take linear time."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from complete_fn.errors import InputError, TooLargeError
from complete_fn.rows.formats import FORMATS, LineRows, TableRows, place_of
from complete_fn.rows.limits import NO_LIMITS, TableLimits
from complete_fn.rows.readers import (
    PROMPT_WINDOW_BYTES,
    WINDOW_BYTES,
    WINDOW_ROWS,
    FileSource,
    WindowSize,
    size_for_prompts,
)
from complete_fn.rows.writers import writing

COLUMNS, ROWS = 12, 30
TABLE = pa.table({f"c{n}": [f"{n} {row}" for row in range(ROWS)] for n in range(COLUMNS)})


def source(tmp_path: Path, name: str, limits: TableLimits) -> FileSource:
    path = tmp_path / f"t{FORMATS[name].suffixes[0]}"
    if not path.exists():
        with writing(place_of(str(path)), False) as writer:
            last = TABLE.column_names[-1]
            writer.write(TableRows(TABLE.drop_columns([last])), {last: TABLE.column(last)})
    return FileSource(repr(path.name), name, lambda: path.open("rb"), limits=limits)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    ("enough", "too_few"),
    [
        (TableLimits(columns=COLUMNS), TableLimits(columns=COLUMNS - 1)),
        (TableLimits(rows=ROWS), TableLimits(rows=ROWS - 1)),
    ],
)
def test_a_table_beyond_a_limit_is_refused(
    tmp_path: Path, name: str, enough: TableLimits, too_few: TableLimits
) -> None:
    assert sum(rows.count for rows in source(tmp_path, name, enough).windows()) == ROWS
    with pytest.raises(TooLargeError, match="that are taken"):
        list(source(tmp_path, name, too_few).windows())


def of_text(name: str, text: str, limits: TableLimits = NO_LIMITS) -> FileSource:
    return FileSource("the file", name, lambda: io.BytesIO(text.encode()), limits=limits)


def test_a_header_of_many_names_is_read_in_linear_time() -> None:
    """With a look at all names for each name, this would take minutes."""
    names = [f"c{n}" for n in range(200_000)]
    with pytest.raises(InputError, match="names 'c5' 2 times"):
        list(of_text("csv", ",".join([*names, "c5"])).windows())
    with pytest.raises(TooLargeError):
        list(of_text("csv", ",".join(names), TableLimits(columns=10_000)).windows())


def test_rows_with_other_names_each_are_refused_at_the_limit() -> None:
    lines = [json.dumps({f"r{row}_{n}": "x" for n in range(1000)}) for row in range(30)]
    with pytest.raises(TooLargeError, match="more columns than the 10,000 "):
        list(of_text("jsonl", "\n".join(lines), TableLimits(columns=10_000)).windows())


def test_the_columns_of_lines_are_found_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = LineRows([json.dumps({"a": n, "b": str(n)}).encode() for n in range(50)])
    passes = []
    objects = LineRows.objects
    monkeypatch.setattr(LineRows, "objects", lambda self: passes.append(1) or objects(self))
    found = rows.columns(["a", "b", "c"])
    assert len(passes) == 1
    assert found["a"].to_pylist() == found["b"].to_pylist() == [str(n) for n in range(50)]
    assert found["c"].null_count == 50


@pytest.mark.parametrize("name", FORMATS)
def test_windows_are_smaller_where_a_template_is_long(tmp_path: Path, name: str) -> None:
    usual = source(tmp_path, name, NO_LIMITS)
    assert [rows.count for rows in usual.windows()] == [ROWS]
    small = replace(usual, window=size_for_prompts(PROMPT_WINDOW_BYTES // 7, 1))
    counts = [rows.count for rows in small.windows()]
    assert (max(counts), sum(counts)) == (7, ROWS)


@pytest.mark.parametrize("name", FORMATS)
def test_windows_are_smaller_where_a_template_names_a_column_often(tmp_path: Path, name: str) -> None:
    usual = source(tmp_path, name, NO_LIMITS)
    often = replace(
        usual, window=size_for_prompts(1, WINDOW_BYTES // 1_000)
    )  # 1,000 bytes of rows or fewer in a window
    counts = [rows.count for rows in often.windows()]
    assert len(counts) > 1
    assert sum(counts) == ROWS


def test_a_window_always_has_a_row() -> None:
    assert size_for_prompts(10**12, 1).rows == 1
    assert size_for_prompts(0, 0) == WindowSize(WINDOW_ROWS, WINDOW_BYTES)
