"""Requests of any shape to every route: never a 5xx, always an error in OpenAI's form, nothing of our insides."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

TEXT = st.text(st.characters(exclude_categories=()), max_size=20)  # lone surrogates too
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=8,
)
IDS = st.sampled_from(["file-0", "../../state.sqlite3", "%2e%2e%2fstate", "a" * 300, "\x00", "é", "'--", "batch_", "."])
FIELDS = [
    "model", "messages", "prompt", "source", "options", "column", "max_cost", "priority", "idempotency_key", "stop",
    "temperature", "top_p", "top_k", "seed", "max_tokens", "max_completion_tokens", "n", "stream", "response_format",
    "input_file_id", "endpoint", "completion_window", "metadata", "query_tag", "stream_options", "user",
]  # fmt: skip
GOOD = {
    "model": "echo",
    "messages": [{"role": "user", "content": "x"}],
    "prompt": "{text}",
    "source": {"file_id": "file-0"},
    "input_file_id": "file-0",
    "endpoint": "/v1/chat/completions",
    "completion_window": "24h",
}
POSTS = ["/v1/chat/completions", "/v1/completions", "/v1/jobs", "/v1/batches"]
WANTED = {
    "/v1/chat/completions": ("model", "messages"),
    "/v1/completions": ("model", "prompt"),
    "/v1/jobs": ("model", "prompt", "source"),
    "/v1/batches": ("input_file_id", "endpoint", "completion_window"),
}
often = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def check(reply: httpx.Response, insides: str) -> None:
    assert reply.status_code < 500, (reply.request.method, reply.request.url, reply.text)
    assert insides not in reply.text
    if reply.status_code >= 400:
        assert set(reply.json()["error"]) == {"message", "type", "param", "code"}


def post(client: httpx.Client, path: str, body: Any) -> httpx.Response:
    """`json=` of httpx refuses NaN and lone surrogates; an attacker does not."""
    return client.post(path, content=json.dumps(body).encode(), headers={"Content-Type": "application/json"})


@pytest.fixture(scope="module")
def client(shared: Any) -> Any:
    with shared.http() as opened:
        yield opened


@often
@given(path=st.sampled_from(POSTS), body=JSON)
def test_any_json(client: httpx.Client, shared: Any, path: str, body: Any) -> None:
    check(post(client, path, body), str(shared.state.folder))


@often
@given(path=st.sampled_from(POSTS), changes=st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=3))
def test_almost_right_bodies(client: httpx.Client, shared: Any, path: str, changes: dict[str, Any]) -> None:
    body = {**{name: GOOD[name] for name in WANTED[path]}, **changes}
    check(post(client, path, body), str(shared.state.folder))


@pytest.mark.parametrize(
    ("path", "field"),
    [(path, field) for path in POSTS for field in FIELDS if field not in ("source", "options")],
)
def test_half_a_character_in_any_field(client: httpx.Client, shared: Any, path: str, field: str) -> None:
    body = {**{name: GOOD[name] for name in WANTED[path]}, field: "\ud800"}
    check(post(client, path, body), str(shared.state.folder))


@often
@given(options=st.dictionaries(st.sampled_from([*FIELDS, "cache", "strict"]), JSON, min_size=1, max_size=3))
def test_any_options_of_a_job(client: httpx.Client, shared: Any, options: dict[str, Any]) -> None:
    body = {name: GOOD[name] for name in WANTED["/v1/jobs"]} | {"options": options}
    check(post(client, "/v1/jobs", body), str(shared.state.folder))


@often
@given(data=st.data())
def test_every_route_with_strange_ids_and_queries(client: httpx.Client, shared: Any, data: st.DataObject) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    path = data.draw(st.sampled_from(sorted(paths)))
    method = data.draw(st.sampled_from(sorted(paths[path])))
    for name in ("job_id", "batch_id", "file_id", "name"):
        path = path.replace(f"{{{name}}}", quote(data.draw(IDS), safe="%"))
    names = st.sampled_from(["limit", "after", "purpose", "format", "details", "partial", "by", "since"])
    query = data.draw(st.dictionaries(names, st.text(max_size=12), max_size=3))
    check(client.request(method, path, params=query), str(shared.state.folder))


@often
@given(line=st.binary(max_size=60) | JSON.map(lambda v: json.dumps(v).encode()))
def test_any_bytes_as_a_table_or_a_batch(client: httpx.Client, shared: Any, line: bytes) -> None:
    for name, path in (
        ("x.jsonl", "/v1/batches"),
        ("x.jsonl", "/v1/jobs"),
        ("x.csv", "/v1/jobs"),
        ("x.parquet", "/v1/jobs"),
    ):
        purpose = "batch" if path == "/v1/batches" else "user_data"
        sent = client.post("/v1/files", files={"file": (name, line)}, data={"purpose": purpose})
        check(sent, str(shared.state.folder))
        file = sent.json()["id"]
        body = {n: GOOD[n] for n in WANTED[path]} | {"source": {"file_id": file}, "input_file_id": file}
        check(client.post(path, json={n: body[n] for n in WANTED[path]}), str(shared.state.folder))
        client.delete(f"/v1/files/{file}")


@pytest.mark.parametrize("depth", [17, 330, 500, 960, 5_000, 100_000])
@pytest.mark.parametrize(("opening", "closing"), [('{"a":', "}"), ("[", "]")])
def test_a_schema_nested_too_deep(client: httpx.Client, shared: Any, depth: int, opening: str, closing: str) -> None:
    deep = opening * depth + "1" + closing * depth
    chat = json.dumps({name: GOOD[name] for name in WANTED["/v1/chat/completions"]})[:-1]
    job = json.dumps({name: GOOD[name] for name in WANTED["/v1/jobs"]})[:-1]
    for path, body in (
        ("/v1/chat/completions", chat + ', "response_format": {"type": "json_schema", "json_schema": %s}}'),
        ("/v1/chat/completions", chat + ', "response_format": {"type": "json_schema", "json_schema": {"schema": %s}}}'),
        ("/v1/jobs", job + ', "options": {"response_format": %s}}'),
        ("/v1/dialects/postgres/complete", '{"model": "echo", "prompts": ["a"], "options": {"response_format": %s}}'),
    ):
        reply = client.post(path, content=(body % deep).encode(), headers={"Content-Type": "application/json"})
        assert reply.status_code == 400, (path, depth, reply.text)
