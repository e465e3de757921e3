"""Options: what is taken, and that a refusal names the value."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

import pytest

from complete_fn.errors import InvalidOptionError
from complete_fn.prompts.options import OPTIONS, SCHEMA_DEPTH, Options, canonical_schema, parse_options
from complete_fn.types import SamplingParams

SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}


def test_every_option_has_a_field_a_check_and_a_description() -> None:
    known = {f.name for kind in (Options, SamplingParams) for f in fields(kind)} - {"sampling"}
    assert set(OPTIONS) == known
    assert all(option.what.endswith(".") for option in OPTIONS.values())


def test_defaults_are_greedy_and_leave_the_length_open() -> None:
    assert parse_options(None).sampling == SamplingParams(temperature=0.0, top_p=1.0, top_k=0, max_tokens=None)


def test_none_counts_as_not_given() -> None:
    assert parse_options({"temperature": None, "seed": None}) == parse_options({})


def test_everything_given_is_kept() -> None:
    found = parse_options({"temperature": 1, "top_p": 0.5, "top_k": 3, "max_tokens": 7, "seed": 1, "stop": "x"})
    assert found.sampling == SamplingParams(1.0, 0.5, 3, 7, 1, ("x",))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", "warm"),
        ("temperature", float("nan")),
        ("temperature", True),
        ("top_p", 0),
        ("top_p", 1.5),
        ("top_k", -1),
        ("top_k", 1.5),
        ("max_tokens", 0),
        ("max_tokens", "many"),
        ("max_tokens", 1 << 63),
        ("seed", -1),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop", 3),
        ("cache", "maybe"),
        ("strict", "yes"),
    ],
)
def test_a_value_out_of_range_is_named(name: str, value: Any) -> None:
    with pytest.raises(InvalidOptionError) as caught:
        parse_options({name: value})
    assert name in str(caught.value)
    assert repr(value) in str(caught.value)


def test_an_unknown_option_gets_the_nearest_name() -> None:
    with pytest.raises(InvalidOptionError, match=r"'max_token'.*Did you mean 'max_tokens'"):
        parse_options({"max_token": 3})


@pytest.mark.parametrize(
    "given",
    [
        SCHEMA,
        json.dumps(SCHEMA),
        {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}},
        {"type": "json", "schema": SCHEMA},
        {**SCHEMA, "title": None},
    ],
)
def test_every_form_of_a_schema_is_the_same_schema(given: Any) -> None:
    assert json.loads(canonical_schema(given)) == SCHEMA


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ("{", "not JSON"),
        ({}, "not a JSON schema"),
        ([1], "not a JSON schema"),
        ({"type": "no such type"}, "not a valid JSON schema"),
        ({"type": "object", "properties": {"a": {"type": 3}}}, "properties/a"),
        ({"type": "string", "pattern": "x" * 70_000}, "at most 65536"),
        ({"type": "string", "title": "\ud800"}, "half of a character"),
    ],
)
def test_what_is_no_schema_says_why(given: Any, why: str) -> None:
    with pytest.raises(InvalidOptionError, match=why):
        canonical_schema(given)


def test_a_schema_too_deep_is_refused() -> None:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(SCHEMA_DEPTH):
        schema = {"type": "array", "items": schema}
    with pytest.raises(InvalidOptionError, match="deeper than 16"):
        canonical_schema(schema)


@pytest.mark.parametrize("reference", ["http://127.0.0.1:9/x", "other.json", "#/$defs/none", "#nowhere"])
def test_a_reference_must_lead_to_a_place_within_the_schema(reference: str) -> None:
    with pytest.raises(InvalidOptionError, match="not within the schema"):
        canonical_schema({"type": "object", "properties": {"a": {"$ref": reference}}})


def test_a_reference_that_only_leads_to_itself_is_refused() -> None:
    with pytest.raises(InvalidOptionError, match="leads only to itself"):
        canonical_schema({"$ref": "#"})
    with pytest.raises(InvalidOptionError, match="leads only to itself"):
        canonical_schema({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"})


def test_a_recursive_schema_that_ends_is_taken() -> None:
    tree = {"type": "object", "properties": {"next": {"$ref": "#"}}}
    assert json.loads(canonical_schema(tree)) == tree


def test_a_schema_nested_beyond_reading_is_refused() -> None:
    with pytest.raises(InvalidOptionError, match="not JSON"):
        canonical_schema("[" * 200_000)
