"""Routes of an OpenAPI document as Markdown."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from docs.markdown import block, code, prose, sentence, table, text


def kind_of(schema: dict[str, Any], known: dict[str, Any]) -> str:
    """A JSON schema's type in a few words."""
    if "$ref" in schema:
        return str(schema["$ref"]).rpartition("/")[2]
    if "anyOf" in schema:
        return " or ".join(kind_of(s, known) for s in schema["anyOf"] if s.get("type") != "null")
    if "const" in schema:
        return json.dumps(schema["const"])
    if "enum" in schema:
        return " or ".join(json.dumps(v) for v in schema["enum"])
    if schema.get("type") == "array":
        return f"list of {kind_of(schema.get('items', {}), known)}"
    return str(schema.get("type", "any"))


def field_rows(schema: dict[str, Any], known: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, ...]]:
    """(name, type, meaning) of each field of a body, those of bodies inside it below it."""
    for name, found in schema.get("properties", {}).items():
        needed = name in schema.get("required", ())
        default = found.get("default")
        more = "required" if needed else "" if default in (None, {}, "") else f"default {json.dumps(default)}"
        told = "; ".join(x for x in (found.get("description", "").rstrip("."), more) if x)
        yield code(prefix + name), text(kind_of(found, known)), text(told)
        for inner in [found, *found.get("anyOf", ()), found.get("items", {})]:
            if "$ref" in inner:
                yield from field_rows(known[inner["$ref"].rpartition("/")[2]], known, f"{prefix}{name}.")


def operation(path: str, verb: str, found: dict[str, Any], known: dict[str, Any]) -> str:
    parts = [f"### {verb.upper()} {path}\n", sentence(found["summary"]) + "\n", prose(found.get("description", ""))]
    given = [
        (code(p["name"]), p["in"], text(kind_of(p["schema"], known)), text(p.get("description", "")))
        for p in found.get("parameters", ())
    ]
    parts.append(table(("parameter", "in", "type", "meaning"), given) if given else "")
    for media, body in found.get("requestBody", {}).get("content", {}).items():
        schema = body["schema"]
        choices = [schema, *schema.get("anyOf", ())]
        names = [c["$ref"].rpartition("/")[2] for c in choices if "$ref" in c]
        rows = [row for name in names for row in field_rows(known[name], known)]
        parts.append(f"Body: `{media}`.\n")
        parts.append(table(("field", "type", "meaning"), rows) if rows else "")
        for example in [e for name in names for e in known[name].get("examples", ())]:
            parts.append(block(json.dumps(example, indent=2), "json"))
    return "\n".join(p for p in parts if p)


def routes(document: dict[str, Any]) -> Iterator[str]:
    """A section for each tag, with its routes."""
    known = document.get("components", {}).get("schemas", {})
    by_tag: dict[str, list[str]] = {}
    for path, verbs in document["paths"].items():
        for verb, found in verbs.items():
            by_tag.setdefault(found.get("tags", ["other"])[0], []).append(operation(path, verb, found, known))
    for tag, parts in by_tag.items():
        yield "\n".join((f"## {tag[:1].upper()}{tag[1:]}\n", *parts))
