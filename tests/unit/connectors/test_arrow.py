"""Columns to prompts: types, NULLs, templates, messages, and rows grouped by model and options."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pyarrow as pa
import pytest

from complete_fn.errors import InputError, InvalidOptionError
from complete_fn.prompts.templates import pack_messages, unpack
from complete_fn.types import Message
from complete_fn_connectors.arrow import (
    CallGroup,
    by_group,
    groups,
    option_mapping,
    plain_value,
    prompt_column,
    prompt_structs,
)

TEXTS = ["a", None, "c"]


@pytest.mark.parametrize(
    "column",
    [
        pa.array(TEXTS),
        pa.array(TEXTS, pa.large_string()),
        pa.array(TEXTS, pa.string_view()),
        pa.array(TEXTS).dictionary_encode(),
        pa.chunked_array([TEXTS[:1], TEXTS[1:]]),
    ],
)
def test_every_kind_of_text_is_a_prompt(column: Any) -> None:
    prompts = prompt_column(column)
    assert prompts.type == pa.large_string()
    assert prompts.to_pylist() == TEXTS


def test_a_null_literal_is_a_column_of_nulls() -> None:
    assert prompt_column(pa.nulls(2)).to_pylist() == [None, None]


@pytest.mark.parametrize("column", [pa.array([1, 2]), pa.array([b"x"]), pa.array([["x"]]), pa.array([{"x": "y"}])])
def test_other_types_are_refused_with_the_type_and_the_cast(column: Any) -> None:
    with pytest.raises(InputError, match=r"The prompt is .*CAST\(x AS VARCHAR\)"):
        prompt_column(column)


def test_messages_become_one_text_and_a_null_inside_makes_the_row_null() -> None:
    rows = [
        [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}],
        [{"role": "user", "content": None}],
        None,
        [],
    ]
    kind = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    packed = prompt_column(pa.array(rows, kind)).to_pylist()
    assert unpack(packed[0]) == (Message("system", "be brief"), Message("user", "hi"))
    assert packed[1:] == [None, None, pack_messages([])]


def rendered(template: Any, *fields: Any) -> Any:
    return prompt_column(prompt_structs([template, *fields])).to_pylist()


def test_a_template_takes_named_fields_of_any_scalar_type_row_by_row() -> None:
    fields = pa.array([{"x": "one", "n": 1}, {"x": "{n}", "n": 2}, {"x": None, "n": 3}])
    texts = rendered(pa.array(["{n}. {x} {{}}"] * 3), fields)
    assert texts == ["1. one {}", "2. {n} {}", None]  # a field's braces are text, not a template


def test_rows_may_have_different_templates() -> None:
    fields = pa.array([{"x": "one"}, {"x": "two"}, {"x": "three"}])
    assert rendered(pa.array(["A {x}", "B {x}", None]), fields) == ["A one", "B two", None]


def test_fields_may_be_a_map_or_by_position_as_snowflake_writes_them() -> None:
    mapped = pa.array([[("x", "one")], [("x", "two")]], pa.map_(pa.string(), pa.string()))
    assert rendered(pa.array(["A {x}"] * 2), mapped) == ["A one", "A two"]
    assert rendered(pa.array(["{0}-{1}-{0} {{2}}"] * 2), pa.array(["a", "b"]), pa.array([7, 8])) == [
        "a-7-a {2}",
        "b-8-b {2}",
    ]


def test_a_prompt_needs_no_fields() -> None:
    assert rendered(pa.array(["plain", None])) == ["plain", None]


@pytest.mark.parametrize(
    ("template", "error", "message"),
    [
        ("{x.y}", InvalidOptionError, r"'\{x.y\}' at character 0"),
        ("{x!r}", InvalidOptionError, "only {name} is replaced"),
        ("{x", InvalidOptionError, "Write {{ and }} for braces"),
        ("{y}", InputError, "names {y}, which is not among the fields"),
    ],
)
def test_a_bad_template_is_a_query_fault(template: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        prompt_structs([pa.array([template]), pa.array([{"x": "one"}])])


def test_a_struct_with_a_template_of_its_own_is_a_prompt_too() -> None:
    structs = pa.array([{"template": "A {x}", "fields": {"x": 1}}, None])
    assert prompt_column(structs).to_pylist() == ["A 1", None]


def test_equal_models_and_options_are_one_group() -> None:
    options = pa.array([{"temperature": Decimal("0.5"), "stop": ["a"]}] * 3)
    assert list(groups(pa.array(["m"] * 3), options)) == [CallGroup("m", {"temperature": 0.5, "stop": ["a"]})]


def test_rows_that_differ_are_grouped_and_answers_come_back_in_order() -> None:
    models = pa.array(["a", "b", None, "a", "b"])
    options = pa.array(['{"seed": 1}', None, None, '{"seed":1}', '{"seed": 2}'])
    found = list(groups(models, options))
    asked = [(g.model, g.options, g.rows.tolist()) for g in found]
    assert asked == [("a", {"seed": 1}, [0, 3]), ("b", None, [1]), ("b", {"seed": 2}, [4])]
    answers = by_group(5, found, lambda g: pa.array([f"{g.model}{r}" for r in g.rows]), pa.string())
    assert answers.to_pylist() == ["a0", "b1", None, "a3", "b4"]


def test_rows_without_a_model_are_in_no_group() -> None:
    assert list(groups(pa.nulls(3), None)) == []
    assert by_group(3, [], lambda g: None, pa.string()).to_pylist() == [None] * 3


def test_a_model_that_is_no_text_is_refused() -> None:
    with pytest.raises(InputError, match="The model is int64"):
        list(groups(pa.array([1]), None))


def test_options_may_be_a_map() -> None:
    kind = pa.map_(pa.string(), pa.decimal128(4, 1))
    options = pa.array([[("max_tokens", Decimal("16.0")), ("temperature", Decimal("0.5"))]], kind)
    assert next(groups(pa.array(["m"]), options)).options == {"max_tokens": 16, "temperature": 0.5}


@pytest.mark.parametrize("value", ["{", "[1]", 3, ["x"]])
def test_options_that_are_no_object_are_refused(value: Any) -> None:
    with pytest.raises(InvalidOptionError, match=r"The options"):
        option_mapping(value)


def test_decimals_become_what_they_look_like() -> None:
    assert plain_value({"a": Decimal("2.00"), "b": [Decimal("0.25")]}) == {"a": 2, "b": [0.25]}


def test_a_lone_surrogate_never_gets_into_a_column() -> None:
    with pytest.raises(UnicodeEncodeError, match="surrogates not allowed"):
        pa.array(["\ud800"], pa.large_string())
