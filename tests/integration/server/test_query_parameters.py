"""A query parameter that a route does not have is refused, on every route, with the names that the route has."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI

from complete_fn import EchoEngine
from complete_fn.errors import UnknownParameterError
from complete_fn.server.app import make_app
from complete_fn.server.worker_api import internal_app
from complete_fn.service.engine_host import EngineHost
from complete_fn.service.state import ServiceState


def routes_of(app: FastAPI) -> set[tuple[str, str]]:
    return {(verb.upper(), path) for path, verbs in app.openapi()["paths"].items() for verb in verbs}


def test_every_route_refuses_a_parameter_that_it_does_not_have(shared: Any, tmp_path: Path) -> None:
    engines = EngineHost(ServiceState(tmp_path / "home", None, EchoEngine(64)))
    app = make_app(engines)
    documented = app.openapi()["paths"]
    routes = routes_of(app)
    assert len(routes) > 25
    assert routes_of(internal_app(engines, "secret")) < routes
    with shared.http() as client:
        for verb, path in sorted(routes):
            place = re.sub(
                r"\{(\w+)\}", lambda found: {"dialect": "bigquery", "function": "complete"}.get(found[1], "x"), path
            )
            reply = client.request(verb, place, params={"limitt": "1"})
            assert reply.status_code == 400, (verb, path, reply.text)
            known = [p["name"] for p in documented[path][verb.lower()].get("parameters", ()) if p["in"] == "query"]
            assert "has no query parameter 'limitt'." in reply.text, (verb, path)
            assert f"It takes {', '.join(sorted(known)) or 'none'}." in reply.text, (verb, path)
    engines.close()


@pytest.mark.parametrize(
    ("path", "query", "message"),
    [
        (
            "/v1/jobs",
            {"state": "failed"},
            "GET /v1/jobs has no query parameter 'state'. Did you mean 'status'? It takes",
        ),
        ("/v1/usage", {"by": "day", "form": "2026-01-01"}, "GET /v1/usage has no query parameter 'form'."),
        ("/v1/models", {"client_version": "1", "x": ""}, "It takes client_version."),
        ("/healthz", {"a" * 300: "1"}, f"GET /healthz has no query parameter '{'a' * 100}'. It takes none."),
    ],
)
def test_the_refusal_names_the_parameter_and_those_that_there_are(
    shared: Any, path: str, query: dict[str, str], message: str
) -> None:
    with shared.http() as client:
        reply = client.get(path, params=query)
    error = reply.json()["error"]
    assert (reply.status_code, error["code"]) == (400, UnknownParameterError.code)
    assert error["param"] in query
    assert message in error["message"]


def test_clients_parameters_are_known(shared: Any) -> None:
    """What the OpenAI libraries and Codex send to the routes that we have."""
    with shared.http() as client:
        assert client.get("/v1/models", params={"client_version": "0.135.0"}).status_code == 200
    openai = shared.openai()
    openai.files.list(limit=5, order="asc", purpose="batch")
    openai.batches.list(limit=5)
