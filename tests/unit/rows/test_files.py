"""Files in, files out: the input's rows and columns come back as they were, with the new column behind them."""

from __future__ import annotations

import gzip
import json
import math
import os
import stat
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from complete_fn.cli.run_input import file_source
from complete_fn.errors import InputError
from complete_fn.rows.formats import LineRows, Rows, TablePlace, TableRows, place_of
from complete_fn.rows.json_values import json_line
from complete_fn.rows.writers import refuse_output, writing
from complete_fn.text import to_texts

TABLE = pa.table(
    {
        "n": pa.array([1, None, 3], pa.int8()),
        "text": ["a,b", 'say "x"\r\n\U0001f980', None],
        "list": pa.array([[1], [], None], pa.list_(pa.int32())),
        "when": pa.array([datetime(2026, 1, 2, 3, 4, 5, 6, UTC)] * 3),
        "day": [date(2026, 1, 2)] * 3,
        "money": pa.array([Decimal("1.50")] * 3),
        "raw": [b"\xff\x00", b"", None],
        "kind": pa.array(["x", "y", "x"]).dictionary_encode(),
    },
    metadata={"origin": "a test"},
)
NEW = {"completion": pa.array(["one", None, 'th"ree,\n'], pa.large_string())}


def read_rows(place: TablePlace) -> Rows:
    """The rows of a file of one window."""
    (rows,) = file_source(place)[0].windows()
    return rows


def write_rows(place: TablePlace, rows: Rows, new: dict[str, Any], overwrite: bool) -> None:
    with writing(place, overwrite) as writer:
        writer.write(rows, new)


def through(place: TablePlace, source: TablePlace, new: dict[str, Any] = NEW) -> None:
    write_rows(place, read_rows(source), new, overwrite=False)


def put(path: Path, content: bytes) -> TablePlace:
    path.write_bytes(content)
    return place_of(str(path))


@pytest.mark.parametrize("suffix", ["parquet", "arrow", "feather"])
def test_columnar_files_keep_types_and_metadata(tmp_path: Path, suffix: str) -> None:
    source = tmp_path / "in.parquet"
    pq.write_table(TABLE, source)
    target = place_of(str(tmp_path / f"out.{suffix}"))
    through(target, place_of(str(source)))
    found = read_rows(target).table()
    assert found.column_names == [*TABLE.column_names, "completion"]
    assert found.drop_columns(["completion"]).cast(TABLE.schema).equals(TABLE)
    assert found["completion"].to_pylist() == NEW["completion"].to_pylist()
    assert found.schema.metadata[b"origin"] == b"a test"
    assert found.schema.field("n").type == pa.int8()


def test_a_table_as_jsonl(tmp_path: Path) -> None:
    pq.write_table(TABLE, tmp_path / "in.parquet")
    through(place_of(str(tmp_path / "out.jsonl.gz")), place_of(str(tmp_path / "in.parquet")))
    lines = gzip.decompress((tmp_path / "out.jsonl.gz").read_bytes()).splitlines()
    first = json.loads(lines[0])
    assert (first["raw"], first["when"]) == ("/wA=", "2026-01-02T03:04:05.000006+00:00")
    assert (first["money"], first["day"], first["list"], first["kind"]) == (1.5, "2026-01-02", [1], "x")
    assert list(first) == [*TABLE.column_names, "completion"]
    assert [json.loads(line)["completion"] for line in lines] == NEW["completion"].to_pylist()


def test_a_table_as_csv(tmp_path: Path) -> None:
    pq.write_table(TABLE.select(["n", "text", "list"]), tmp_path / "in.parquet")
    through(place_of(str(tmp_path / "out.csv")), place_of(str(tmp_path / "in.parquet")))
    assert (tmp_path / "out.csv").read_bytes().decode() == (
        'n,text,list,completion\n1,"a,b",[1],one\n,"say ""x""\r\n\U0001f980",[],\n3,,,"th""ree,\n"\n'
    )


NANOS = 1_700_000_000_000_000_001
ID = "00010203-0405-0607-0809-0a0b0c0d0e0f"
RAW = b"\xff\x00"
STAMP = "2023-11-14T22:13:20.000000001"
NS = pa.timestamp("ns")


@pytest.mark.parametrize(
    ("column", "as_csv", "as_jsonl"),
    [
        (pa.array([RAW, None], pa.binary(2)), '"/wA="', "/wA="),
        (pa.array([RAW, None], pa.binary_view()), '"/wA="', "/wA="),
        (pa.array([RAW, None]).dictionary_encode(), '"/wA="', "/wA="),
        (pa.array([UUID(ID).bytes, None], pa.uuid()), ID, ID),
        (pa.array([pa.MonthDayNano([1, 2, 3]), None]), "[1, 2, 3]", [1, 2, 3]),
        (pa.array([NANOS, None], NS), "2023-11-14 22:13:20.000000001", STAMP),
        (pa.array([NANOS, None], pa.timestamp("ns", "UTC")), "2023-11-14 22:13:20.000000001Z", STAMP + "+00:00"),
        (pa.array([-1, None], NS), "1969-12-31 23:59:59.999999999", "1969-12-31T23:59:59.999999999"),
        (pa.array([NANOS, None], NS).dictionary_encode(), "2023-11-14 22:13:20.000000001", STAMP),
        (pa.array([1, None], pa.time64("ns")), "00:00:00.000000001", "00:00:00.000000001"),
        (pa.array([1_500_000_001, None], pa.duration("ns")), "1500000001", 1.500000001),
        (pa.array([10**7, None], pa.date32()), "29349-01-26", "29349-01-26"),
        (pa.array([[NANOS], None], pa.list_(NS)), f'["{STAMP}"]', [STAMP]),
        (pa.array([{"a": NANOS}, None], pa.struct([("a", NS)])), f'{{"a": "{STAMP}"}}', {"a": STAMP}),
        (pa.array([[("k", NANOS)], None], pa.map_(pa.string(), NS)), f'{{"k": "{STAMP}"}}', {"k": STAMP}),
    ],
    ids=lambda value: str(value.type) if isinstance(value, pa.Array) else "",
)
def test_types_that_no_text_or_python_value_has(tmp_path: Path, column: Any, as_csv: str, as_jsonl: Any) -> None:
    with (
        pa.OSFile(str(tmp_path / "in.arrow"), "wb") as sink,
        pa.ipc.new_file(sink, pa.schema([("x", column.type)])) as w,
    ):
        w.write_table(pa.table({"x": column}))
    source, new = place_of(str(tmp_path / "in.arrow")), {"c": pa.array(["c", "c"])}
    through(place_of(str(tmp_path / "o.csv")), source, new)
    assert read_rows(place_of(str(tmp_path / "o.csv"))).column("x").to_pylist() == [as_csv, None]
    through(place_of(str(tmp_path / "o.jsonl")), source, new)
    found = [json.loads(line)["x"] for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert found == [as_jsonl, None]


def test_nanoseconds_of_one_row_leave_the_others_as_they_are(tmp_path: Path) -> None:
    pq.write_table(pa.table({"x": pa.array([NANOS, NANOS - 1], NS)}), tmp_path / "in.parquet")
    through(place_of(str(tmp_path / "o.jsonl")), place_of(str(tmp_path / "in.parquet")), {"c": pa.array(["c", "c"])})
    found = [json.loads(line)["x"] for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert found == [STAMP, "2023-11-14T22:13:20"]


LONG = Decimal("12345678901234567890.1234567891")


@pytest.mark.parametrize(
    "column",
    [
        pa.array([LONG, Decimal("1.5000000000"), None]),
        pa.array([Decimal(10**50), -LONG, None], pa.decimal256(76, 10)),
        pa.array([[{"m": LONG, "é\u2028": "x\u2028"}], [], None]),
        pa.array([{"m": [LONG, None], "n": 1}, {"m": [], "n": 2}, None]),
    ],
    ids=lambda column: str(column.type),
)
def test_decimals_keep_their_digits_in_jsonl(tmp_path: Path, column: Any) -> None:
    pq.write_table(pa.table({"x": column}), tmp_path / "in.parquet")
    through(place_of(str(tmp_path / "o.jsonl")), place_of(str(tmp_path / "in.parquet")), {"c": pa.array(["c"] * 3)})
    lines = (tmp_path / "o.jsonl").read_text().splitlines()
    assert [json.loads(line, parse_float=Decimal)["x"] for line in lines] == column.to_pylist()


def test_what_json_has_no_number_for_is_null(tmp_path: Path) -> None:
    odd = [math.nan, math.inf, -math.inf, 1.5, None]
    columns = {"x": odd, "list": [odd] * 5, "struct": [{"a": v, "b": "\x85"} for v in odd]}
    rows = TableRows(pa.table(columns).append_column("d", pa.array([Decimal("0.1000000000000000000001")] * 5)))
    for kind in ("jsonl", "csv"):
        new = {"new": pa.array([{"s": v} for v in odd])}
        write_rows(place_of(str(tmp_path / f"out.{kind}")), rows, new, overwrite=False)

    def refused(name: str) -> None:
        raise AssertionError(name)

    lines = (tmp_path / "out.jsonl").read_text().split("\n")[:-1]
    found = [json.loads(line, parse_constant=refused) for line in lines]
    seen = [None, None, None, 1.5, None]
    assert [row["x"] for row in found] == seen
    assert [row["list"] for row in found] == [seen] * 5
    assert [row["struct"] for row in found] == [{"a": v, "b": "\x85"} for v in seen]
    assert [row["new"] for row in found] == [{"s": v} for v in seen]
    assert "NaN" not in (tmp_path / "out.csv").read_text()


def test_a_map_of_decimals_has_its_keys_as_text(tmp_path: Path) -> None:
    column = pa.array([[(1, LONG)]], pa.map_(pa.int8(), pa.decimal128(30, 10)))
    pq.write_table(pa.table({"x": column}), tmp_path / "in.parquet")
    through(place_of(str(tmp_path / "o.jsonl")), place_of(str(tmp_path / "in.parquet")), {"c": pa.array(["c"])})
    assert (tmp_path / "o.jsonl").read_text() == f'{{"x": {{"1": {LONG}}}, "c": "c"}}\n'


csv_value = st.one_of(st.none(), st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00")))


@settings(deadline=None)
@given(st.lists(st.tuples(csv_value, csv_value), min_size=1, max_size=8))
def test_csv_values_come_back_byte_for_byte(rows: list[tuple[str | None, str | None]]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        table = pa.table({name: pa.array([r[n] for r in rows], pa.string()) for n, name in enumerate(("a", "b\n"))})
        pq.write_table(table, f"{folder}/in.parquet")
        new = {"c": pa.array(["x"] * len(rows))}
        through(place_of(f"{folder}/out.csv"), place_of(f"{folder}/in.parquet"), new)
        found = read_rows(place_of(f"{folder}/out.csv")).table()
    assert found.column_names == ["a", "b\n", "c"]
    assert list(zip(found["a"].to_pylist(), found["b\n"].to_pylist(), strict=True)) == rows


def test_csv_has_no_types_and_keeps_what_it_has(tmp_path: Path) -> None:
    source = put(tmp_path / "in.csv", b'\xef\xbb\xbfzip,x\r\n007,1.50\r\n,""\r\n\xff,true\r\n')
    rows = read_rows(source)
    assert rows.column("zip").slice(0, 2).to_pylist() == ["007", None]
    assert to_texts(rows.column("zip"))[2] == "\udcff"
    through(place_of(str(tmp_path / "out.csv")), source)
    lines = (tmp_path / "out.csv").read_bytes().split(b"\n")
    assert lines[:4] == [b"zip,x,completion", b"007,1.50,one", b',"",', b'\xff,true,"th""ree,']


def test_a_csv_row_may_be_large(tmp_path: Path) -> None:
    rows = read_rows(put(tmp_path / "x.csv", b'a,b\n"' + b"x\n" * 1_000_000 + b'",2\n'))
    assert rows.count == 1
    assert len(rows.column("a")[0].as_py()) == 2_000_000


CUT = gzip.compress(b'{"a": 1}\n' * 9, mtime=0)[:-9]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.parquet", b"PAR1" + b"\x00" * 50, r"'.*x.parquet' cannot be read as parquet: .*its writer was killed"),
        ("x.parquet", b"", "cannot be read as parquet"),
        ("x.arrow", b"ARROW1\x00\x00abc", "cannot be read as arrow"),
        ("x.csv", b"", "The CSV is empty"),
        ("x.csv", b"a,a\n1,2\n", "names 'a' 2 times"),
        ("x.csv", b"a,b\n1\n", "Expected 2 columns, got 1"),
        ("x.csv", b"\xff,b\n1,2\n", "not UTF-8"),
        ("x.jsonl", b'{"a": 1}\n{"a": ', "Line 2 of the JSONL is not JSON"),
        ("x.jsonl", b'{"a": 1}\n\n[1]\n', "Line 3 of the JSONL is no object but list"),
        ("x.jsonl.gz", CUT, "cannot be read as jsonl: Truncated compressed stream"),
        ("x.csv.gz", b"a,b\n1,2\n", "cannot be read"),
        ("x.txt", b"hello", r"The format of '.*x.txt' is not known. Say --format"),
    ],
)
def test_unusable_inputs_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_rows(place_of(str(tmp_path / name)))


def test_a_half_written_parquet_is_refused(tmp_path: Path) -> None:
    pq.write_table(TABLE, tmp_path / "whole.parquet")
    whole = (tmp_path / "whole.parquet").read_bytes()
    with pytest.raises(InputError, match="still be being written"):
        read_rows(put(tmp_path / "half.parquet", whole[: len(whole) // 2]))
    with pytest.raises(InputError, match="cannot be read as parquet"):
        read_rows(put(tmp_path / "torn.parquet", b"PAR1" + b"\xff" * (len(whole) - 804) + whole[-800:]))


@pytest.mark.parametrize("name", ["missing.csv", "."])
def test_what_cannot_be_opened_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"cannot be read: (No such file|Is a directory)"):
        read_rows(TablePlace(str(tmp_path / name), "csv"))


LINES = [
    rb'{"text": "\ud800 alone", "n": 1.50, "big": 123456789012345678901234567890}',
    b'{"n":2,   "text": "\xff"}',
    rb'{"other": {"k": ["\udc00"]}}',
    b"{ }",
    '{"text": "\U0001f980", "n": null}'.encode(),
]


def test_jsonl_lines_come_back_byte_for_byte(tmp_path: Path) -> None:
    source = put(tmp_path / "in.jsonl", b"\n".join(LINES[:2]) + b"\n\n" + b"\r\n".join(LINES[2:]))
    new = {"completion": pa.array(["a", None, "b\n", "c", "\U0001f980"])}
    through(place_of(str(tmp_path / "out.jsonl")), source, new)
    assert (tmp_path / "out.jsonl").read_bytes().splitlines() == [
        LINES[0][:-1] + b', "completion": "a"}',
        LINES[1][:-1] + b', "completion": null}',
        LINES[2][:-1] + rb', "completion": "b\n"}',
        b'{"completion": "c"}',
        LINES[4][:-1] + ', "completion": "\U0001f980"}'.encode(),
    ]


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_a_written_line_is_one_line_to_any_reader(text: str) -> None:
    line = json_line({text: text + "\x85\u2028\u2029\r\n\x0b\x0c\x1e"})
    assert line.splitlines() == [line]
    assert json.loads(line) == {text: text + "\x85\u2028\u2029\r\n\x0b\x0c\x1e"}


def test_answers_that_end_lines_elsewhere_stay_in_theirs(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a\u2028": ["x\x85", "é"]}), tmp_path / "in.parquet")
    source = place_of(str(tmp_path / "in.parquet"))
    through(
        source=source, place=place_of(str(tmp_path / "out.jsonl")), new={"completion": pa.array(["1\u20282", None])}
    )
    lines = (tmp_path / "out.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"a\u2028": "x\x85", "completion": "1\u20282"},
        {"a\u2028": "é", "completion": None},
    ]


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_bytes_that_are_no_utf8_are_escapes_that_every_reader_takes(tmp_path: Path, suffix: str) -> None:
    source = put(tmp_path / "in.csv", b"text,plain\ncaf\xe9,\xc3\xa9\n,b\n")
    new = {"new": pa.array(["a", None])}
    through(place_of(str(tmp_path / f"out.{suffix}")), source, new)
    through(place_of(str(tmp_path / "out.csv")), source, new)
    rows = read_rows(place_of(str(tmp_path / f"out.{suffix}")))
    rows.table().validate(full=True)
    assert rows.table().to_pydict() == {"text": ["caf\\udce9", None], "plain": ["é", "b"], "new": ["a", None]}
    assert b"caf\xe9" in (tmp_path / "out.csv").read_bytes()


def test_text_that_is_utf8_is_not_taken_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("complete_fn.rows.writers.to_texts", None)
    texts = pa.chunked_array([pa.array(["é", None]), pa.array(["\U0001f980"])])
    table = pa.table({"text": texts, "large": texts.cast(pa.large_string()), "n": [1, 2, 3]}, metadata={"origin": "a"})
    place = place_of(str(tmp_path / "out.arrow"))
    write_rows(place, TableRows(table), NEW, overwrite=False)
    assert read_rows(place).table().equals(table.append_column("completion", NEW["completion"]), check_metadata=True)


def test_jsonl_columns_are_text_and_missing_ones_null() -> None:
    rows = LineRows(LINES)
    assert rows.names == ["text", "n", "big", "other"]
    assert rows.column("n").to_pylist() == ["1.5", "2", None, None, None]
    texts = to_texts(rows.column("text"))
    assert texts[4] == "\U0001f980"
    assert texts[2:4] == [None, None]
    for text in texts[:2]:
        with pytest.raises(UnicodeEncodeError):
            text.encode()


def test_jsonl_as_a_table_loses_nothing(tmp_path: Path) -> None:
    source = put(tmp_path / "in.jsonl", b"\n".join(LINES))
    through(place_of(str(tmp_path / "out.parquet")), source, {"c": pa.array(["x"] * 5)})
    found = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert found[0] == {
        "text": "\\ud800 alone",
        "n": 1.5,
        "big": "123456789012345678901234567890",
        "other": None,
        "c": "x",
    }
    assert [row["text"] for row in found[1:]] == ["\\udcff", None, None, "\U0001f980"]
    assert found[2]["other"] == {"k": ["\\udc00"]}


def test_details_are_nested_in_jsonl_and_json_in_csv(tmp_path: Path) -> None:
    source = put(tmp_path / "in.csv", b"a,b\n1,2\n")
    new = {"d": pa.array([{"cost": Decimal("0.000000123"), "error": {"code": "timeout"}}])}
    through(place_of(str(tmp_path / "o.jsonl")), source, new)
    assert json.loads((tmp_path / "o.jsonl").read_text())["d"] == {"cost": 1.23e-7, "error": {"code": "timeout"}}
    through(place_of(str(tmp_path / "o.csv")), source, new)
    text = read_rows(place_of(str(tmp_path / "o.csv"))).column("d")[0].as_py()
    assert json.loads(text) == {"cost": 1.23e-7, "error": {"code": "timeout"}}


def test_an_output_is_there_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = put(tmp_path / "in.csv", b"a,b\n1,2\n")
    (tmp_path / "out.csv").write_text("before")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    rows = read_rows(source)
    with pytest.raises(InputError, match=r"No space left on device\. The answers are kept"):
        write_rows(place_of(str(tmp_path / "out.csv")), rows, {"c": pa.array(["x"])}, overwrite=True)
    assert (tmp_path / "out.csv").read_text() == "before"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.csv", "out.csv"]


@pytest.mark.parametrize(
    ("column", "kind"),
    [
        (pa.array([pa.MonthDayNano([1, 2, 3])]), "parquet"),  # ArrowNotImplementedError
        (pa.array([10**12], pa.timestamp("s")), "jsonl"),  # OverflowError
        (pa.array([[(date(2026, 1, 2), 1)]], pa.map_(pa.date32(), pa.int8())), "csv"),  # TypeError
    ],
)
def test_values_that_a_format_cannot_hold_name_the_remedy(tmp_path: Path, column: Any, kind: str) -> None:
    message = rf"The rows cannot be written as {kind}: .* Choose an output of another format"
    with pytest.raises(InputError, match=message):
        write_rows(
            place_of(str(tmp_path / f"o.{kind}")), TableRows(pa.table({"x": column})), {"c": pa.array(["c"])}, False
        )
    assert list(tmp_path.iterdir()) == []


def test_windows_of_other_columns_name_the_remedy(tmp_path: Path) -> None:
    with writing(place_of(str(tmp_path / "o.parquet")), overwrite=False) as writer:
        writer.write(TableRows(pa.table({"x": [1]})), {"c": pa.array(["c"])})
        with pytest.raises(InputError, match=r"cannot be written as parquet: Table schema does not match"):
            writer.write(TableRows(pa.table({"x": ["1"]})), {"c": pa.array(["c"])})


def test_two_runs_write_one_output_apart(tmp_path: Path) -> None:
    """Also where both are process 1, of two containers; what a killed one has left stands in nobody's way."""
    rows = read_rows(put(tmp_path / "in.csv", b"a,b\n1,2\n"))
    killed = tmp_path / f".out.csv.{os.getpid()}.part"
    killed.write_bytes(b"half")
    target = place_of(str(tmp_path / "out.csv"))
    with writing(target, overwrite=True) as first:
        first.write(rows, {"c": pa.array(["first"])})
        write_rows(target, rows, {"c": pa.array(["second"])}, overwrite=True)
        assert (tmp_path / "out.csv").read_text() == "a,b,c\n1,2,second\n"
    assert (tmp_path / "out.csv").read_text() == "a,b,c\n1,2,first\n"
    assert killed.read_bytes() == b"half"
    assert len(list(tmp_path.iterdir())) == 3


def test_an_output_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    source = put(tmp_path / "in.csv", b"a,b\n1,2\n")
    target = place_of(str(tmp_path / "out.csv"))
    refuse_output(target, overwrite=False)
    (tmp_path / "out.csv").write_text("another's")
    with pytest.raises(InputError, match=r"exists\. Say --overwrite"):
        through(target, source, {"c": pa.array(["x"])})
    assert (tmp_path / "out.csv").read_text() == "another's"


def test_an_output_has_the_mode_of_any_new_file(tmp_path: Path) -> None:
    mask = os.umask(0o027)
    try:
        through(place_of(str(tmp_path / "o.csv")), put(tmp_path / "i.csv", b"a,b\n1,2\n"), {"c": pa.array(["x"])})
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "o.csv").stat().st_mode) == 0o640


def test_a_link_is_written_through(tmp_path: Path) -> None:
    (tmp_path / "real.csv").write_text("before")
    (tmp_path / "link.csv").symlink_to("real.csv")
    rows = read_rows(put(tmp_path / "i.csv", b"a,b\n1,2\n"))
    write_rows(place_of(str(tmp_path / "link.csv")), rows, {"c": pa.array(["x"])}, overwrite=True)
    assert (tmp_path / "link.csv").is_symlink()
    assert (tmp_path / "real.csv").read_text() == "a,b,c\n1,2,x\n"


def test_unusable_outputs_are_refused(tmp_path: Path) -> None:
    (tmp_path / "there.csv").write_text("")
    for name, message in [("there.csv", "exists"), (".", "is a folder"), ("no/such.csv", "No such file or directory")]:
        with pytest.raises(InputError, match=message):
            refuse_output(TablePlace(str(tmp_path / name), "csv"), overwrite=False)
    with pytest.raises(InputError, match="cannot be written"):
        refuse_output(TablePlace("/proc/x.csv", "csv"), overwrite=True)
    refuse_output(TablePlace("/dev/null", "csv"), overwrite=False)


def test_a_pipe_is_written_into(tmp_path: Path) -> None:
    source = put(tmp_path / "in.csv", b"a,b\n1,2\n")
    reading, writing = os.pipe()
    through(TablePlace(f"/dev/fd/{writing}", "csv"), source, {"c": pa.array(["x"])})
    os.close(writing)
    with open(reading, "rb") as pipe:
        assert pipe.read() == b"a,b,c\n1,2,x\n"


@pytest.mark.parametrize("suffix", ["gz", "bz2", "zst"])
def test_compressed_files(tmp_path: Path, suffix: str) -> None:
    through(place_of(str(tmp_path / f"o.csv.{suffix}")), put(tmp_path / "i.csv", b"a,b\n1,2\n"), {"c": pa.array(["x"])})
    assert (tmp_path / f"o.csv.{suffix}").read_bytes()[:3] not in (b"a,b", b"")
    assert read_rows(place_of(str(tmp_path / f"o.csv.{suffix}"))).table().to_pylist() == [
        {"a": "1", "b": "2", "c": "x"}
    ]
