"""Prompts with their fields apart: what the model sees, and that the order of the fields never tells in a key."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from complete_fn.engines.base import EchoEngine
from complete_fn.engines.call import Call
from complete_fn.engines.catalogue import Model
from complete_fn.errors import InputError, InvalidOptionError
from complete_fn.execution.admission import Tools
from complete_fn.execution.runner import run
from complete_fn.prompts.fields import unpack_fields
from complete_fn.prompts.templates import render_column, unpack
from complete_fn.store.store import Store
from complete_fn.text import text_column
from complete_fn.types import Asker

MODEL = Model("m", "m", engine="echo")
TEMPLATE = "Name the section. {a} {b}\n{c}"
cells = st.lists(st.text(max_size=6), min_size=3, max_size=3)
tables = st.lists(cells, min_size=1, max_size=20)


def packed(template: str, **columns: list[str | None]) -> pa.ChunkedArray:
    arrays = {name: pa.array(values, pa.string()) for name, values in columns.items()}
    return render_column(template, arrays, len(next(iter(columns.values()))), reorder_fields=True)


def of_rows(rows: list[list[str]]) -> pa.ChunkedArray:
    columns = {name: text_column([r[f] for r in rows]) for f, name in enumerate("abc")}
    return render_column(TEMPLATE, columns, len(rows), reorder_fields=True)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("Name it. {a} {b}", "Name it.\n\na: 1\nb: 2"),
        ("{a}\n{b}", "a: 1\nb: 2"),
        ("Is {a} like {b}? Say yes or no.", "Is <a> like <b>? Say yes or no.\n\na: 1\nb: 2"),
        ("Compare {{}} {a} with: {b} ", "Compare {} <a> with:\n\na: 1\nb: 2"),
    ],
)
def test_the_text_is_the_instruction_and_a_line_a_field(template: str, text: str) -> None:
    assert unpack(packed(template, a=["1"], b=["2"])[0].as_py()) == text


@settings(deadline=None)
@given(cells)
def test_packing_keeps_every_value(values: list[str]) -> None:
    found = unpack_fields(of_rows([values])[0].as_py())
    assert (found.names, found.values) == (("a", "b", "c"), tuple(values))
    assert sorted(found.render([2, 0, 1])) == sorted(found.render())


def test_a_null_field_makes_a_null_row_and_a_template_without_fields_is_refused() -> None:
    assert packed("{a} {b}", a=["1", None], b=["2", "2"]).null_count == 1
    with pytest.raises(InvalidOptionError, match="needs a template that names fields"):
        packed("hello", a=["1"])
    with pytest.raises(InputError, match=r"names \{b\}, which is no column. Columns: a"):
        packed("{a} {b}", a=["1"])


@settings(max_examples=30, deadline=None)
@given(tables)
def test_every_row_gets_the_answer_to_its_own_fields(rows: list[list[str]]) -> None:
    """The echo of each row has exactly its lines, each distinct row is asked once, and all is known the next time."""
    import tempfile

    engine = EchoEngine(context=10**6)
    with tempfile.TemporaryDirectory() as home:
        tools = Tools(engine, Store(Path(home) / "s"))
        answers = run(Call(MODEL), of_rows(rows), tools, Asker())
        for row, text in zip(rows, answers.text.to_pylist(), strict=True):
            expected = "Name the section. " + " ".join(f"{n}: {v}" for n, v in zip("abc", row, strict=True))
            assert sorted(text.split()) == sorted(expected.split())
        assert len(engine.requests) == len({tuple(r) for r in rows})
        again = run(Call(MODEL), of_rows([*rows[::-1], ["x", "y", "z"]]), tools, Asker())
        assert again.text.to_pylist()[: len(rows)] == answers.text.to_pylist()[::-1]
        assert again.summary.computed == (["x", "y", "z"] not in rows)


def test_the_summary_says_how_many_rows_were_reordered(tmp_path: Path) -> None:
    long = "the same long text of many words that comes again and again in this table " * 4
    rows = [[str(n), str(n * 7), long] for n in range(10)]
    engine = EchoEngine(context=10**6)
    answers = run(Call(MODEL), of_rows(rows), Tools(engine, Store(tmp_path / "s")), Asker())
    assert answers.summary.reordered == 10
    assert "10 with their fields reordered" in answers.summary.line()
    assert all(str(r.prompt).startswith("Name the section.\n\nc: the same") for r in engine.requests)


@settings(max_examples=20, deadline=None)
@given(tables)
def test_the_details_say_in_which_order_the_model_saw_the_fields(rows: list[list[str]]) -> None:
    import tempfile

    engine = EchoEngine(context=10**6)
    with tempfile.TemporaryDirectory() as home:
        tools = Tools(engine, Store(Path(home) / "s"))
        found = run(Call(MODEL), of_rows(rows), tools, Asker()).details.to_pylist()
        known = run(Call(MODEL), of_rows(rows), tools, Asker()).details.to_pylist()
    seen = {str(r.prompt) for r in engine.requests}
    for row, details in zip(rows, found, strict=True):
        values = dict(zip("abc", row, strict=True))
        lines = "\n".join(f"{name}: {values[name]}" for name in details["field_order"])
        assert f"Name the section.\n\n{lines}" in seen
    assert {row["field_order"] for row in known} == {None}  # the order is not kept with the answer


def test_a_users_text_cannot_pose_as_packed_fields() -> None:
    from complete_fn.prompts.templates import escaped

    text = packed("{a}", a=["1"])[0].as_py()
    assert unpack(escaped(pa.array([text], pa.large_string()))[0].as_py()) == text
