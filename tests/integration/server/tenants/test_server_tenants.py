"""Keys, scopes, tenants and their budgets."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import openai
import pytest

from complete_fn import EchoEngine
from complete_fn.jobs.api_keys import SCOPES
from complete_fn.ledger.usage import usage
from tests.clocks import pass_time


def ask(client: openai.OpenAI, text: str, model: str = "echo", **more: Any) -> str | None:
    messages: list[Any] = [{"role": "user", "content": text}]
    return (
        client.chat.completions.create(model=model, messages=messages, temperature=0, **more).choices[0].message.content
    )


def test_once_there_is_a_key_nobody_gets_in_without_one(running: Any) -> None:
    assert ask(running.openai("anything"), "open") == "open"
    key = running.state.keys.create("acme", "ann")
    name, secret = key.split("-")[1:]
    assert ask(running.openai(key), "x") == "x"
    wrong = [f"cfn-{name}-{secret[:-1]}{'0' if secret[-1] != '0' else '1'}", f"cfn-{'0' * 12}-{secret}", "cfn", "none"]
    for bad in wrong:
        with pytest.raises(openai.AuthenticationError):
            ask(running.openai(bad), "x")
    with running.http() as client:
        assert client.get("/v1/models").status_code == 401
        assert client.get("/healthz").status_code == 200
    running.state.keys.revoke(name)
    with pytest.raises(openai.AuthenticationError):
        ask(running.openai(key), "x")
    with pytest.raises(openai.AuthenticationError):  # revoking the last key does not open the door
        ask(running.openai(), "x")


def test_another_tenants_ids_are_nothing_on_every_route(running: Any) -> None:
    """Each route with an id in its path replies to another tenant what it replies for an id that never was."""
    mine, theirs = (running.state.keys.create(tenant, "u", list(SCOPES)) for tenant in ("acme", "bolt"))
    with running.http(mine) as client:
        table = {"file": ("t.jsonl", b'{"text": "a"}\n')}
        line = {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions"}
        line["body"] = {"model": "echo", "messages": [{"role": "user", "content": "a"}]}
        requests = {"file": ("b.jsonl", json.dumps(line).encode())}
        file, batch_file = (
            client.post("/v1/files", files=content, data={"purpose": purpose}).json()["id"]
            for content, purpose in ((table, "user_data"), (requests, "batch"))
        )
        body = {"model": "echo", "prompt": "{text}", "source": {"file_id": file}}
        job = client.post("/v1/jobs", json=body).json()["id"]
        asked = {"input_file_id": batch_file, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
        batch = client.post("/v1/batches", json=asked).json()["id"]
        ids = {"{job_id}": job, "{file_id}": file, "{batch_id}": batch}
        paths = client.get("/openapi.json").json()["paths"]
    routes = [(method, path) for path, methods in paths.items() for method in methods if "_id}" in path]
    assert len(routes) >= 12
    with running.http(theirs) as stranger, running.http(mine) as client:
        for method, path in routes:
            (name,) = [name for name in ids if name in path]
            found, unknown = (path.replace(name, x) for x in (ids[name], ids[name][:-4] + "0000"))
            replies = [stranger.request(method, place) for place in (found, unknown)]
            assert [reply.status_code for reply in replies] == [404, 404], (method, path)
            texts = [r.text.replace(ids[name], "X").replace(ids[name][:-4] + "0000", "X") for r in replies]
            assert texts[0] == texts[1]
        assert stranger.post("/v1/jobs", json=body).status_code == 404
        assert stranger.post("/v1/batches", json=asked).status_code == 404
        for place in ("/v1/jobs", "/v1/batches", "/v1/files"):
            assert stranger.get(place).json()["data"] == []
        for name, path in (("{job_id}", "/v1/jobs/"), ("{file_id}", "/v1/files/"), ("{batch_id}", "/v1/batches/")):
            assert client.get(path + ids[name]).status_code == 200


def test_without_a_loopback_bind_keys_are_always_asked_for(serve: Callable[..., Any]) -> None:
    with pytest.raises(openai.AuthenticationError):
        ask(serve(loopback=False).openai(), "x")


def test_a_key_does_what_its_scopes_say(running: Any) -> None:
    key = running.state.keys.create("acme", "ann", ["usage"])
    with pytest.raises(openai.PermissionDeniedError):
        ask(running.openai(key), "x")
    assert running.openai(key).models.list().data


@pytest.mark.parametrize(
    "headers", [{"Host": "evil.example"}, {"Origin": "https://evil.example"}, {"Origin": "http://["}]
)
def test_pages_of_other_sites_cannot_use_a_visitors_service(shared: Any, headers: dict[str, str]) -> None:
    with shared.http() as client:
        assert client.get("/v1/models", headers=headers).status_code == 403
        assert client.get("/v1/models", headers={"Origin": "http://localhost:3000"}).status_code == 200


def test_answers_and_the_prefix_cache_are_not_shared_across_tenants(serve: Callable[..., Any]) -> None:
    salts = []

    class Salted(EchoEngine):
        def stream(self, requests: Any, tenant: str) -> Any:
            salts.append(tenant)
            return super().stream(requests, tenant)

    engine = Salted(64)
    running = serve(engine)
    ann, bob = (running.state.keys.create(tenant, "u") for tenant in ("acme", "bolt"))
    for key in (ann, ann, bob):
        ask(running.openai(key), "the same question")
    assert len(engine.requests) == 2
    assert salts == ["acme", "bolt"]


def test_a_daily_budget_is_never_passed(serve: Callable[..., Any]) -> None:
    engine = EchoEngine(64)
    running = serve(engine)
    key = running.state.keys.create("acme", "ann")
    other = running.state.keys.create("bolt", "bob")
    running.state.keys.set_daily_budget("acme", Decimal("0.000132"))
    client = running.openai(key)
    # A row costs 3 + 2 x 2 = 7 millionths and reserves 64 + 2 x 2 = 68: the tenth is the last that 132 can cover.
    for n in range(10):
        assert ask(client, f"{n} b c", max_tokens=2) == f"{n} b"
    with pytest.raises(openai.APIStatusError) as caught:
        ask(client, "10 b c", max_tokens=2)
    assert caught.value.status_code == 402
    assert "daily budget" in caught.value.message
    assert ask(running.openai(other), "x", max_tokens=2) == "x"
    assert sum(line.cost for line in usage(running.state.store, tenant="acme")) == Decimal("0.000070")


def test_a_model_of_another_currency_than_the_budgets_is_refused(serve: Callable[..., Any], models_file: Path) -> None:
    yen = "[models.yen]\nengine = 'echo'\ncheckpoint = 'e'\nprices = { input = 1, output = 2, currency = 'JPY' }\n"
    models_file.write_text(models_file.read_text() + yen)
    running = serve(EchoEngine(64))
    client = running.openai(running.state.keys.create("acme", "ann"))
    ask(client, "a", model="yen")
    running.state.keys.set_daily_budget("acme", Decimal(1))
    with pytest.raises(openai.APIStatusError) as caught:
        ask(client, "b", model="yen")
    assert "has a daily budget in USD, and 'yen' is priced in JPY" in caught.value.message
    running.state.keys.set_daily_budget("acme", Decimal(1), "JPY")
    assert ask(client, "c", model="yen", max_tokens=1) == "c"


def test_a_key_ends_when_its_days_are_over(running: Any) -> None:
    key = running.state.keys.create("acme", "ann", days=2)
    assert ask(running.openai(key), "x") == "x"
    pass_time(running.state.store, 2 * 86_400 + 1)
    with pytest.raises(openai.AuthenticationError, match="expired"):
        ask(running.openai(key), "y")


def test_usage_shows_a_tenant_its_own_lines_only(running: Any) -> None:
    ann, bob = (running.state.keys.create(tenant, "u") for tenant in ("acme", "bolt"))
    ask(running.openai(ann), "one two")
    ask(running.openai(ann), "one two")
    ask(running.openai(bob), "three")
    with running.http(ann) as client:
        (line,) = client.get("/v1/usage", params={"by": "model,user"}).json()["data"]
        assert (line["model"], line["user"], line["rows"], line["input_tokens"]) == ("echo", "u", 2, 2)
        assert (line["cost"], line["saved"]) == ("0.000006000", "0.000006000")
        assert client.get("/v1/usage", params={"since": "2999-01-01"}).json()["data"] == []
        (own,) = client.get("/v1/usage", params={"by": "tenant"}).json()["data"]
        assert (own["tenant"], own["rows"]) == ("acme", 2)
        assert client.get("/v1/usage", params={"by": "prompt"}).status_code == 400
    with running.http(running.state.keys.create("acme", "ann", ["complete"])) as client:
        assert client.get("/v1/usage").status_code == 403


def test_tokens_of_a_minute_are_limited_by_tenant_and_key(serve: Callable[..., Any]) -> None:
    running = serve()
    keys = running.state.keys
    mine, other = keys.create("acme", "a"), keys.create("other", "b")
    keys.limit_tenant("acme", 60)
    body = {"model": "echo", "messages": [{"role": "user", "content": "a b c"}], "max_tokens": 8}
    with running.http(mine) as client:
        first = client.post("/v1/chat/completions", json=body)
        assert first.headers["x-ratelimit-limit-tokens"] == "60"
        assert int(first.headers["x-ratelimit-remaining-tokens"]) == 60 - 6
        replies = [client.post("/v1/chat/completions", json=body) for _ in range(12)]
    refused = replies[-1]
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    assert int(refused.headers["retry-after"]) >= 1
    with running.http(other) as client:
        assert client.post("/v1/chat/completions", json=body).status_code == 200


def test_usage_since_a_time_without_a_zone_is_utc_wherever_the_server_stands(
    running: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask(running.openai(), "x")
    later = (datetime.now(UTC) + timedelta(hours=6)).replace(tzinfo=None).isoformat()
    monkeypatch.setenv("TZ", "Etc/GMT-12")
    time.tzset()
    try:
        with running.http() as client:
            replies = [client.get("/v1/usage", params={"since": s}) for s in ("0001-01-01", "0001-01-01T00:00", later)]
    finally:
        monkeypatch.undo()
        time.tzset()
    assert [len(reply.json()["data"]) for reply in replies] == [1, 1, 0]
