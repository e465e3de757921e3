"""The OpenAI routes, asked by the real `openai` client."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import httpx
import openai
import pytest

from complete_fn import EchoEngine
from complete_fn.ledger.usage import usage
from complete_fn.service.state import Limits
from complete_fn.types import Completion, CompletionRequest, SamplingParams, Usage


def user(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def test_models_are_those_of_the_catalogue(shared: Any) -> None:
    names = [m.id for m in shared.openai().models.list()]
    assert {"echo", "other", "demo-llama"} <= set(names)
    assert shared.openai().models.retrieve("echo").id == "echo"


def test_chat_answers_with_usage_and_openai_defaults(serve: Callable[..., Any]) -> None:
    engine = EchoEngine(64)
    running = serve(engine)
    reply = running.openai().chat.completions.create(
        model="echo", messages=[{"role": "developer", "content": "be brief"}, *user("one two three")]
    )
    assert reply.choices[0].message.content == "be brief one two three"
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage is not None
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens, reply.usage.total_tokens) == (5, 5, 10)
    (asked,) = engine.requests
    assert asked.sampling == SamplingParams(temperature=1.0, top_p=1.0, max_tokens=64)
    assert [m.role for m in asked.prompt if not isinstance(m, str)] == ["system", "user"]


def test_completions_take_several_prompts_and_sixteen_tokens(serve: Callable[..., Any]) -> None:
    engine = EchoEngine(64)
    reply = serve(engine).openai().completions.create(model="echo", prompt=["a b", "c", "a b"])
    assert [(c.index, c.text) for c in reply.choices] == [(0, "a b"), (1, "c"), (2, "a b")]
    assert len(engine.requests) == 3  # sampled answers are not merged
    assert engine.requests[0].sampling.max_tokens == 16


def test_a_prompt_that_fails_takes_no_paid_answer_with_it(running: Any) -> None:
    body = {"model": "echo", "prompt": ["ok fine yes", "w " * 200, "good"], "max_tokens": 5}
    with running.http() as client:
        reply = client.post("/v1/completions", json=body)
        lines = client.post("/v1/completions", json={**body, "stream": True}).text.split("\n\n")
        none = client.post("/v1/completions", json={**body, "prompt": ["w " * 200] * 2})
    assert reply.status_code == 200
    first, failed, last = reply.json()["choices"]
    assert [(c["text"], c["finish_reason"]) for c in (first, last)] == [("ok fine yes", "stop"), ("good", "stop")]
    assert (failed["text"], failed["finish_reason"]) == ("", "error")
    assert failed["error"]["code"] == "context_length_exceeded"
    assert "error" not in first
    assert reply.json()["usage"]["total_tokens"] == 8
    assert lines[-2] == "data: [DONE]"
    ends = [c for line in lines[:-2] for c in json.loads(line[6:])["choices"] if c["finish_reason"] is not None]
    assert [(c["index"], c["finish_reason"]) for c in ends] == [(0, "stop"), (1, "error"), (2, "stop")]
    assert ends[1]["error"]["code"] == "context_length_exceeded"
    assert (none.status_code, none.json()["error"]["code"]) == (400, "context_length_exceeded")


def test_cut_by_the_callers_limit_is_an_answer(shared: Any) -> None:
    reply = shared.openai().chat.completions.create(model="echo", messages=user("a b c"), max_completion_tokens=2)
    assert (reply.choices[0].message.content, reply.choices[0].finish_reason) == ("a b", "length")


def test_streams_end_as_openai_ends_them(shared: Any) -> None:
    chunks = list(
        shared.openai().chat.completions.create(
            model="echo", messages=user("a b"), stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "a b"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].usage.completion_tokens == 2
    text = "".join(c.choices[0].text for c in shared.openai().completions.create(model="echo", prompt="x", stream=True))
    assert text == "x"


def test_greedy_answers_are_reused_and_cost_nothing_again(running: Any) -> None:
    body = {"model": "echo", "messages": user("same words"), "temperature": 0}
    with running.http() as client:
        first, again = (client.post("/v1/chat/completions", json=body) for _ in range(2))
    assert (first.headers["x-complete-cost"], first.headers["x-complete-source"]) == ("0.000006000", "computed")
    assert (again.headers["x-complete-cost"], again.headers["x-complete-source"]) == ("0.000000000", "cache")
    assert first.json()["choices"] == again.json()["choices"]


def test_cached_prompt_tokens_are_told(serve: Callable[..., Any]) -> None:
    class Cached(EchoEngine):
        def complete(self, request: CompletionRequest) -> Completion:
            return Completion("ok", "stop", usage=Usage(10, 7, 1))

    reply = serve(Cached()).openai().chat.completions.create(model="echo", messages=user("x"))
    assert reply.usage.prompt_tokens_details.cached_tokens == 7


@pytest.mark.parametrize("name", ["", "lama", "/etc/passwd", "..", "meta-llama/Llama-3.1-8B", "~"])
def test_only_catalogue_names_are_models(shared: Any, name: str) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        shared.openai().chat.completions.create(model=name, messages=user("x"))
    assert caught.value.code == "model_not_found"


def test_a_schema_with_a_regular_expression_is_not_taken(shared: Any) -> None:
    pattern = {"type": "string", "pattern": "(a+)+$"}
    good = {"type": "object", "properties": {"pattern": {"enum": [{"pattern": "x"}]}}}
    bad: list[Any] = [pattern, {"$defs": {"a": pattern}}, {"anyOf": [pattern]}, {"properties": {"p": pattern}}]
    with shared.http() as client:
        for schema in (good, *bad):
            form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
            body = {"model": "echo", "messages": user("w " * 70), "response_format": form}
            error = client.post("/v1/chat/completions", json=body).json()["error"]
            assert error["code"] == ("context_length_exceeded" if schema is good else "invalid_option")


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"temperature": 3}, None),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"n": 2}, "n"),
        ({"logprobs": True}, "logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"response_format": {"type": "xml"}}, None),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nothing"}}}}, None),
    ],
)
def test_what_cannot_be_done_is_refused_in_openais_form(shared: Any, change: dict[str, Any], param: str | None) -> None:
    with shared.http() as client:
        reply = client.post("/v1/chat/completions", json={"model": "echo", "messages": user("x"), **change})
    error = reply.json()["error"]
    assert reply.status_code == 400
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"]) == ("invalid_request_error", param)


def test_a_prompt_that_is_too_long_has_openais_code(shared: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        shared.openai().chat.completions.create(model="echo", messages=user("w " * 70))
    assert caught.value.code == "context_length_exceeded"


def test_json_that_breaks_the_schema_is_no_answer(serve: Callable[..., Any]) -> None:
    class Wrong(EchoEngine):
        def complete(self, request: CompletionRequest) -> Completion:
            return Completion.failed("schema_mismatch", "The answer is not JSON.")

    with pytest.raises(openai.UnprocessableEntityError):
        serve(Wrong()).openai().chat.completions.create(
            model="echo", messages=user("x"), response_format={"type": "json_object"}
        )


def test_strange_bodies_and_paths_get_clear_refusals(shared: Any) -> None:
    with shared.http() as client:
        replies = {
            400: client.post("/v1/chat/completions", content=b"{nothing", headers={"Content-Type": "application/json"}),
            404: client.get("/v1/nothing"),
            405: client.get("/v1/chat/completions"),
        }
    for status, reply in replies.items():
        assert reply.status_code == status
        assert reply.json()["error"]["message"]


def test_bodies_above_the_limit_are_refused_also_without_a_length(serve: Callable[..., Any]) -> None:
    running = serve(limits=Limits(body_bytes=2_000))
    long = b'{"model": "echo", "messages": [{"role": "user", "content": "' + b"x" * 3_000 + b'"}]}'
    headers = {"Content-Type": "application/json"}
    with running.http() as client:
        told = client.post("/v1/chat/completions", content=long, headers=headers)
        untold = client.post("/v1/chat/completions", content=iter([long[:1000], long[1000:]]), headers=headers)
    for reply in (told, untold):
        assert (reply.status_code, reply.json()["error"]["code"]) == (413, "too_large")


def test_an_exception_nobody_expected_tells_and_logs_no_prompt(
    serve: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(EchoEngine):
        def complete(self, request: CompletionRequest) -> Completion:
            raise ZeroDivisionError(f"while answering {request.prompt}")

    with serve(Broken()).http() as client:
        reply = client.post("/v1/chat/completions", json={"model": "echo", "messages": user("my secret")})
    assert reply.status_code == 500
    assert "secret" not in reply.text + caplog.text
    assert "ZeroDivisionError" in caplog.text


class Slow(EchoEngine):
    """Answers nothing until it is let; notes when its stream is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.closed, self.go = threading.Event(), threading.Event(), threading.Event()

    def stream(self, requests: Iterable[CompletionRequest], tenant: str) -> Iterator[tuple[int, Completion]]:
        try:
            for found in super().stream(requests, tenant):
                self.asked.set()
                self.go.wait(0.5)
                yield found
        finally:
            self.closed.set()


def test_a_client_that_goes_away_stops_its_rows_and_pays_for_none(serve: Callable[..., Any]) -> None:
    engine = Slow()
    running = serve(engine)
    body = {"model": "echo", "prompt": [f"p {n}" for n in range(100)]}
    with running.http() as client, pytest.raises(httpx.ReadTimeout):
        client.post("/v1/completions", json=body, timeout=0.3)
    assert engine.closed.wait(60)
    assert len(engine.requests) < 50
    time.sleep(0.3)
    assert sum(line.rows for line in usage(running.state.store)) < 50


def test_health(shared: Any) -> None:
    with shared.http() as client:
        assert client.get("/healthz").json() == {"status": "ok"}
        assert client.get("/readyz").status_code == 200
        assert client.get("/openapi.json").json()["info"]["title"] == "complete-fn"
