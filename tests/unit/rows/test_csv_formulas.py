"""Text in a CSV that a spreadsheet would run as a formula gets an apostrophe in front, if asked for."""

from __future__ import annotations

import csv
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from complete_fn.errors import InputError
from complete_fn.rows.formats import TablePlace, TableRows, escaping, place_of
from complete_fn.rows.writers import FORMULA
from tests.unit.rows.test_files import csv_value, write_rows

FORMULAS = ["=cmd|' /C calc'!A0", "+1+1", "-1+1", "@SUM(1)", "\t=1", "\r=1", "\n=1", "\uff1d1", "-", "=", "- item"]
NUMBERS = ["-5", "+5", "-1.50", "1e9", "-2E-3", "5"]
formula = st.one_of(csv_value, st.sampled_from(FORMULAS), st.text("=+-@1.e\t\r\n\uff1d"))


def csv_cells(place: TablePlace) -> list[list[str]]:
    with Path(place.name).open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


@settings(deadline=None)
@given(st.lists(st.tuples(formula, formula), min_size=1, max_size=8))
def test_no_cell_of_an_escaped_csv_is_a_formula(rows: list[tuple[str | None, str | None]]) -> None:
    with TemporaryDirectory() as folder:
        table = TableRows(pa.table({"a": pa.array([a for a, _ in rows], pa.string())}))
        new = {"=b": pa.array([b for _, b in rows], pa.large_string())}
        place = escaping(place_of(f"{folder}/out.csv"), True)
        write_rows(place, table, new, overwrite=False)
        head, *found = csv_cells(place)
        assert head == ["a", "'=b"]
        for cells, row in zip(found, rows, strict=True):
            for cell, text in zip(cells, row, strict=True):
                assert cell.removeprefix("'") == (text or "").removeprefix("'")
                assert not cell or cell[0] not in FORMULA or float(cell) is not None
        write_rows(place_of(f"{folder}/plain.csv"), table, new, overwrite=False)
        assert [[a or "", b or ""] for a, b in rows] == csv_cells(place_of(f"{folder}/plain.csv"))[1:]


def test_numbers_of_an_escaped_csv_stay_numbers(tmp_path: Path) -> None:
    place = escaping(place_of(str(tmp_path / "out.csv")), True)
    table = pa.table({"n": [-5], "d": [-1.5], "t": [date(2026, 1, 2)], "nested": [{"=": "=1"}]})
    write_rows(place, TableRows(table), {f"c{n}": pa.array([text]) for n, text in enumerate(NUMBERS)}, overwrite=False)
    assert csv_cells(place)[1] == ["-5", "-1.5", "2026-01-02", '{"=": "=1"}', *NUMBERS]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "arrow"])
def test_only_csv_has_formulas_to_escape(kind: str) -> None:
    with pytest.raises(InputError, match=f"for CSV, not for {kind}"):
        escaping(place_of(f"out.{kind}"), True)
