"""Schemas that cost too much to check are refused in linear time; patterns of strangers too."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from complete_fn.errors import InvalidOptionError
from complete_fn.prompts.options import canonical_schema
from complete_fn.prompts.schema_rules import MOST_STEPS, SchemaSteps, refuse_patterns

LEVELS = 40


def bomb(**at_each_level: Any) -> dict[str, Any]:
    """`$defs` a0..a40, each of which uses the next one as `at_each_level` says, with "NEXT" for the reference."""

    def level(number: int) -> Any:
        text = json.dumps(at_each_level).replace('"NEXT"', json.dumps({"$ref": f"#/$defs/a{number + 1}"}))
        return json.loads(text)

    definitions = {f"a{n}": level(n) for n in range(LEVELS)} | {f"a{LEVELS}": {"type": "object"}}
    return {"$ref": "#/$defs/a0", "$defs": definitions}


BOMBS = {
    "allOf": bomb(allOf=["NEXT", "NEXT"]),
    "oneOf": bomb(oneOf=["NEXT", "NEXT"]),
    "anyOf": bomb(anyOf=["NEXT", {"not": "NEXT"}]),
    "if": bomb(**{"if": "NEXT", "then": "NEXT", "else": "NEXT"}),
    "dependentSchemas": bomb(dependentSchemas={"x": "NEXT", "y": "NEXT"}),
    "items and contains": bomb(items="NEXT", contains="NEXT"),
    "properties": bomb(properties={"a": "NEXT", "b": "NEXT"}),
    "unevaluatedProperties": bomb(unevaluatedProperties="NEXT"),
    "unevaluatedItems": bomb(unevaluatedItems="NEXT"),
    "propertyNames": bomb(propertyNames="NEXT", additionalProperties="NEXT"),
    "anchors": {
        "$ref": "#a0",
        "$defs": {
            f"d{n}": {"$anchor": f"a{n}", "allOf": [{"$ref": f"#a{n + 1}"}] * 2 if n < LEVELS else []}
            for n in range(LEVELS + 1)
        },
    },
    "dynamic": {
        "$dynamicRef": "#a0",
        "$defs": {
            f"d{n}": {"$dynamicAnchor": f"a{n}", "allOf": [{"$dynamicRef": f"#a{n + 1}"}] * 2 if n < LEVELS else [True]}
            for n in range(LEVELS + 1)
        },
    },
}
BOMBS["anchors"]["$defs"][f"d{LEVELS}"] = {"$anchor": f"a{LEVELS}"}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_schema_that_doubles_at_each_level_is_refused(kind: str) -> None:
    assert len(json.dumps(BOMBS[kind])) < 8000
    with pytest.raises(InvalidOptionError, match="10000 subschemas"):
        canonical_schema(BOMBS[kind])


def test_a_long_chain_of_references_is_counted_or_refused() -> None:
    chain = {f"a{n}": {"allOf": [{"$ref": f"#/$defs/a{n + 1}"}]} for n in range(1200)} | {"a1200": {}}
    with pytest.raises(InvalidOptionError, match="10000 subschemas"):
        canonical_schema({"$ref": "#/$defs/a0", "$defs": chain})


def test_an_id_inside_could_hide_another_definition() -> None:
    inner = BOMBS["allOf"] | {"$id": "https://example.org/inner"}
    harmless = {f"a{n}": {} for n in range(LEVELS + 1)}
    with pytest.raises(InvalidOptionError, match=r"\$id below its top"):
        canonical_schema({"properties": {"x": inner}, "$defs": harmless})


@pytest.mark.parametrize(
    "schema",
    [
        {"$id": "https://example.org/top", "type": "object", "properties": {"$id": {"type": "string"}}},
        {"const": {"$id": "a value"}},
        {"$ref": "#/$defs/tree", "$defs": {"tree": {"properties": {"l": {"$ref": "#/$defs/tree"}}}}},
        {"properties": {f"field_{n}": {"type": "string", "enum": ["a", "b"]} for n in range(300)}},
        bomb(allOf=["NEXT"]),
    ],
)
def test_an_ordinary_schema_is_taken(schema: dict[str, Any]) -> None:
    assert json.loads(canonical_schema(schema)) == schema


def test_a_tree_is_recursive_and_counted_once() -> None:
    tree = {"properties": {"l": {"$ref": "#"}, "r": {"$ref": "#"}}}
    steps = SchemaSteps(tree)
    assert steps.is_recursive
    assert steps.total < 10


def written_out(schema: Any, definitions: dict[str, Any]) -> int:
    """The count by its definition: follow each reference anew."""
    if not isinstance(schema, dict):
        return 1
    inner = [*schema.get("allOf", []), *schema.get("properties", {}).values()]
    if "$ref" in schema:
        inner.append(definitions[schema["$ref"].rpartition("/")[2]])
    return 1 + sum(written_out(s, definitions) for s in inner)


@given(st.data())
def test_the_count_is_that_of_the_schema_written_out(data: st.DataObject) -> None:
    """Definitions refer to later ones only, so that they can be written out."""
    names = [f"a{n}" for n in range(6)]

    def subschema(later: list[str]) -> st.SearchStrategy[Any]:
        leaf = st.booleans() | st.just({"type": "string"})
        if later:
            leaf |= st.sampled_from(later).map(lambda name: {"$ref": f"#/$defs/{name}"})
        lists = st.lists(leaf, min_size=1, max_size=3)
        inner = lists.map(lambda found: {"allOf": found})
        return leaf | inner | st.dictionaries(st.sampled_from("xyz"), leaf).map(lambda found: {"properties": found})

    definitions = {name: data.draw(subschema(names[n + 1 :])) for n, name in enumerate(names)}
    schema = {"$ref": "#/$defs/a0", "$defs": definitions}
    assert SchemaSteps(schema).total == min(written_out(schema, definitions), MOST_STEPS + 1)


def test_a_pattern_is_refused_wherever_it_stands() -> None:
    for schema in ({"pattern": "a"}, {"$defs": {"a": {"patternProperties": {"a": {}}}}}, {"items": [{"pattern": "a"}]}):
        with pytest.raises(InvalidOptionError, match="regular expression"):
            refuse_patterns(json.dumps(schema))
    refuse_patterns(json.dumps({"properties": {"pattern": {"enum": [{"pattern": "a"}]}}}))
