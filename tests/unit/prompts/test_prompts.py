"""Templates: what is replaced, what is refused, what becomes NULL."""

from __future__ import annotations

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from complete_fn.errors import InputError, InvalidOptionError
from complete_fn.prompts.templates import (
    escape,
    escaped,
    pack_messages,
    parse_template,
    render_column,
    template_fields,
    unpack,
)
from complete_fn.types import Message


def rendered(template: str, **columns: pa.Array) -> list[str | None]:
    length = len(next(iter(columns.values()), [None]))
    return render_column(template, columns, length).to_pylist()


def test_fields_are_replaced_and_double_braces_are_braces() -> None:
    assert rendered("{{x}} is {a}!", a=pa.array(["1", "2"])) == ["{x} is 1!", "{x} is 2!"]


def test_a_null_field_makes_the_prompt_null() -> None:
    assert rendered("{a}-{b}", a=pa.array(["x", None]), b=pa.array(["y", "z"])) == ["x-y", None]


def test_numbers_dates_and_dictionaries_are_cast() -> None:
    assert rendered("{a}", a=pa.array([1, None])) == ["1", None]
    assert rendered("{a}", a=pa.array(["x", "y", "x"]).dictionary_encode()) == ["x", "y", "x"]


def test_a_template_without_fields_is_the_same_prompt_for_every_row() -> None:
    assert render_column("hello", {"a": pa.array([1, 2])}, 2).to_pylist() == ["hello", "hello"]


@pytest.mark.parametrize("template", ["{", "}", "{a.b}", "{a[0]}", "{a!r}", "{a:>3}", "{}", "{0}", '{"a": 1}'])
def test_anything_but_a_name_is_refused_and_quoted(template: str) -> None:
    with pytest.raises(InvalidOptionError, match=r"only {name} is replaced"):
        parse_template(template)


def test_an_unknown_field_names_the_columns() -> None:
    with pytest.raises(InputError, match=r"\{b\}, which is no column. Columns: a"):
        rendered("{b}", a=pa.array(["x"]))


@pytest.mark.parametrize("column", [pa.array([b"x"]), pa.array([[1]]), pa.array([{"x": 1}])])
def test_a_column_without_text_form_is_refused_by_name(column: pa.Array) -> None:
    with pytest.raises(InputError, match="Column 'a' is"):
        rendered("{a}", a=column)


@given(st.text())
def test_a_value_is_never_read_as_a_template(value: str) -> None:
    value = value.encode("utf-8", "ignore").decode()
    assert rendered("<{a}>", a=pa.array([value])) == [f"<{value}>"]


def test_field_names_come_in_order() -> None:
    assert template_fields("{b} {a} {b}") == ["b", "a", "b"]


def test_messages_survive_packing_and_strings_stay_strings() -> None:
    packed = pack_messages([{"role": "system", "content": "é"}, {"role": "user", "content": '"x"\n'}])
    assert unpack(packed) == (Message("system", "é"), Message("user", '"x"\n'))
    assert unpack("plain") == "plain"


@pytest.mark.parametrize("text", ['\x00messages:[["system","x"]]', "\x00messages:broken", "\x00", "\x00\x00a"])
def test_data_never_poses_as_messages(text: str) -> None:
    assert unpack(escape(text)) == text
    assert [unpack(t) for t in escaped(pa.array([text, "plain"], pa.large_string())).to_pylist()] == [text, "plain"]
    assert [unpack(t or "") for t in rendered("{a}", a=pa.array([text]))] == [text]


@pytest.mark.parametrize("text", ["hello", "", "\x00messages:[]"])
def test_one_message_of_a_user_is_the_bare_prompt(text: str) -> None:
    assert pack_messages([{"role": "user", "content": text}]) == escape(text)
    assert unpack(pack_messages([{"role": "user", "content": text}])) == text
