"""Streamed answers: text as it is made, one ledger line, errors in the stream, and clients that leave."""

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
from complete_fn.types import INTERACTIVE, Completion, CompletionRequest, Usage


def user(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


class Steps(EchoEngine):
    """Tells one word, then waits until it is let; notes when its stream is closed."""

    def __init__(self, last: Completion | None = None) -> None:
        super().__init__()
        self.go, self.closed = threading.Event(), threading.Event()
        self.last = last

    def stream(self, requests: Iterable[CompletionRequest], tenant: str) -> Iterator[tuple[int, Completion]]:
        try:
            for position, request in enumerate(requests):
                self.requests.append(request)
                if request.tell is not None:
                    request.tell("first ", Usage(3, 0, 1))
                while not self.go.wait(0.02):
                    if getattr(requests, "abandoned", False):
                        return
                yield position, self.last or Completion("first second", "stop", usage=Usage(3, 0, 2))
        finally:
            self.closed.set()


def test_text_comes_before_the_row_is_done(serve: Callable[..., Any]) -> None:
    engine = Steps()
    running = serve(engine)
    stream = running.openai().chat.completions.create(
        model="echo", messages=user("x"), stream=True, stream_options={"include_usage": True}
    )
    texts = (c.choices[0].delta.content for c in stream if c.choices)
    assert (next(texts), next(texts)) == ("", "first ")
    engine.go.set()
    assert list(texts) == ["second", None]
    assert engine.requests[0].priority == INTERACTIVE
    (line,) = usage(running.state.store)
    assert (line.rows, line.input, line.output) == (1, 3, 2)


def test_the_tier_flex_does_not_overtake(serve: Callable[..., Any]) -> None:
    engine = EchoEngine()
    serve(engine).openai().chat.completions.create(model="echo", messages=user("x"), service_tier="flex")
    assert engine.requests[0].priority == 0


def test_several_prompts_stream_each_under_its_index(serve: Callable[..., Any]) -> None:
    client = serve(EchoEngine()).openai()
    prompts = ["a b", "c d e", "a b"]
    found = dict.fromkeys(range(3), "")
    reasons = {}
    chunks = list(client.completions.create(model="echo", prompt=prompts, stream=True, temperature=0))
    for chunk in chunks:
        (choice,) = chunk.choices
        found[choice.index] += choice.text
        reasons[choice.index] = choice.finish_reason or reasons.get(choice.index)
    assert list(found.values()) == prompts
    assert set(reasons.values()) == {"stop"}
    assert len(chunks) == 7 + 3  # words and ends


def test_an_error_in_the_middle_of_a_stream_is_told_in_it(serve: Callable[..., Any]) -> None:
    engine = Steps(Completion.failed("timeout", "The engine gave up."))
    stream = serve(engine).openai().chat.completions.create(model="echo", messages=user("x"), stream=True)
    engine.go.set()
    with pytest.raises(openai.APIError, match="gave up"):
        list(stream)


def test_an_exception_in_the_middle_of_a_stream_tells_no_prompt(
    serve: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(EchoEngine):
        def complete(self, request: CompletionRequest) -> Completion:
            if request.tell is not None:
                request.tell("half", Usage(3, 0, 1))
            raise ZeroDivisionError(f"while answering {request.prompt}")

    with serve(Broken()).http() as client:
        reply = client.post("/v1/chat/completions", json={"model": "echo", "messages": user("secret"), "stream": True})
    events = [line.removeprefix("data: ") for line in reply.text.split("\n\n") if line]
    assert (reply.status_code, events[-1]) == (200, "[DONE]")
    assert json.loads(events[-2])["error"]["code"] == "internal_error"
    assert "secret" not in reply.text + caplog.text


def test_an_error_before_the_first_word_has_its_status(shared: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        shared.openai().chat.completions.create(model="echo", messages=user("w " * 70), stream=True)
    assert caught.value.code == "context_length_exceeded"


def test_a_client_that_leaves_a_stream_pays_what_it_was_told(serve: Callable[..., Any]) -> None:
    engine = Steps()
    running = serve(engine)
    body = {"model": "echo", "messages": user("x"), "stream": True}
    with running.http() as client, client.stream("POST", "/v1/chat/completions", json=body) as reply:
        next(reply.iter_lines())
    assert engine.closed.wait(60)
    (line,) = lines_of(running)
    assert (line.rows, line.input, line.output, line.lost_rows) == (1, 3, 1, 0)
    engine.go.set()
    assert running.openai().chat.completions.create(model="echo", messages=user("x")).choices[0].finish_reason == "stop"
    assert [(line.rows, line.output) for line in usage(running.state.store)] == [(2, 3)]


def test_a_client_that_leaves_without_a_word_pays_nothing(serve: Callable[..., Any]) -> None:
    engine = Steps()
    running = serve(engine)
    with running.http() as client, pytest.raises(httpx.ReadTimeout):
        client.post("/v1/chat/completions", json={"model": "echo", "messages": user("x")}, timeout=1.0)
    (line,) = lines_of(running)
    assert (line.rows, line.lost_rows) == (0, 1)


def lines_of(running: Any) -> list[Any]:
    """The ledger, once the run has ended."""
    until = time.monotonic() + 60
    while not (lines := usage(running.state.store)) and time.monotonic() < until:
        time.sleep(0.05)
    return lines


def test_a_streamed_answer_is_reused_and_comes_in_one_piece(running: Any) -> None:
    with running.http() as client:
        body = {"model": "echo", "messages": user("one two"), "stream": True, "temperature": 0}
        first, again = (client.post("/v1/chat/completions", json=body).text.count("data: ") for _ in range(2))
    assert (first, again) == (1 + 2 + 2, 1 + 1 + 2)
    assert [(line.rows, line.saved > 0) for line in usage(running.state.store, ["model"])] == [(2, True)]
