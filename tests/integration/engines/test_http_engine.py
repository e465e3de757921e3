"""HttpEngine against a real HTTP server that answers as endpoints do, friendly and not."""

from __future__ import annotations

import asyncio
import http.server
import itertools
import json
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from complete_fn.engines import openai_chat as http_chat
from complete_fn.engines.catalogue import Model
from complete_fn.engines.http_engine import HttpEngine, open_engine
from complete_fn.errors import EngineBusyError, EngineError, RequestError
from complete_fn.settings import Settings
from complete_fn.types import Completion, CompletionRequest, Message, SamplingParams, Usage

Reply = tuple[int, dict[str, Any] | Iterator[bytes], dict[str, str]]  # an iterator: the body's pieces, as they come
Script = Callable[[dict[str, Any]], Reply]


def said(text: Any, reason: str = "stop", tokens: int = 2) -> Reply:
    usage = {
        "prompt_tokens": 11,
        "completion_tokens": tokens,
        "prompt_tokens_details": {"cached_tokens": 8},
    }
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": reason}
    return 200, {"object": "chat.completion", "choices": [choice], "usage": usage}, {}


def refused(status: int, message: str, code: str | None = None, **headers: str) -> Reply:
    return status, {"error": {"message": message, "code": code}}, {k.replace("_", "-"): v for k, v in headers.items()}


class Endpoint:
    """A server whose replies a test scripts. `asked` has all bodies, `most` the most requests at one time."""

    def __init__(self) -> None:
        self.script: Script = lambda body: said(body["messages"][-1]["content"].upper())
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.now = self.most = self.hung_up = 0
        self.lock = threading.Lock()
        endpoint = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with endpoint.lock:
                    endpoint.asked.append(body)
                    endpoint.keys.append(self.headers.get("authorization"))
                    endpoint.now += 1
                    endpoint.most = max(endpoint.most, endpoint.now)
                try:
                    self.reply(*endpoint.script(body))
                except OSError:
                    endpoint.hung_up += 1
                finally:
                    with endpoint.lock:
                        endpoint.now -= 1

            def do_GET(self) -> None:
                self.reply(200, {"data": [{"id": "served-model"}]}, {})

            def reply(self, status: int, found: dict[str, Any] | Iterator[bytes], headers: dict[str, str]) -> None:
                whole = b"" if isinstance(found, Iterator) else json.dumps(found).encode()
                length = {"content-length": str(len(whole))} if whole else {"connection": "close"}
                self.send_response(status)
                for name, value in {**headers, **length}.items():
                    self.send_header(name, value)
                self.end_headers()
                for piece in found if isinstance(found, Iterator) else [whole]:
                    self.wfile.write(piece)

            def log_message(self, *_: object) -> None:
                pass

        class Server(http.server.ThreadingHTTPServer):
            request_queue_size = 128  # the default of 5 resets connections that come at once

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    found = Endpoint()
    yield found
    found.server.shutdown()
    found.server.server_close()


@pytest.fixture
def connect(endpoint: Endpoint, tmp_path: Any) -> Iterator[Callable[..., HttpEngine]]:
    opened: list[HttpEngine] = []

    def make(**changes: Any) -> HttpEngine:
        entry = {"url": endpoint.url, "engine": "http", "default_max_tokens": 50, **changes}
        opened.append(open_engine(Model("remote", "served-model", **entry), Settings(tmp_path, None, None)))
        return opened[-1]

    yield make
    for engine in opened:
        engine.close()


def ask(engine: HttpEngine, *prompts: Any, schema: str | None = None, **sampling: Any) -> list[Completion]:
    requests = [CompletionRequest("remote", p, SamplingParams(**sampling), schema) for p in prompts]
    answers = dict(engine.stream(requests, "tenant-7"))
    return [answers[n] for n in range(len(prompts))]


def code(completion: Completion) -> str | None:
    return completion.error.code if completion.error else None


def test_answers_usage_and_what_is_sent(endpoint: Endpoint, connect: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REMOTE_KEY", "sesame")
    engine = connect(api_key_env="REMOTE_KEY")
    turns = (Message("system", "brief"), Message("user", "hello"))
    first, second = ask(engine, "hello", turns, seed=3, stop=("X",), top_k=5)
    assert (first.text, first.finish_reason, first.error) == ("HELLO", "stop", None)
    assert (first.usage.prompt_tokens, first.usage.cached_tokens, first.usage.completion_tokens) == (11, 8, 2)
    assert second.text == "HELLO"
    body = next(b for b in endpoint.asked if len(b["messages"]) == 1)
    assert body["messages"] == [{"role": "user", "content": "hello"}]
    assert {k: body[k] for k in ("model", "temperature", "top_p", "top_k", "seed", "stop", "max_tokens")} == {
        "model": "served-model",
        "temperature": 0.0,
        "top_p": 1.0,
        "top_k": 5,
        "seed": 3,
        "stop": ["X"],
        "max_tokens": 50,
    }
    assert "cache_salt" not in body
    assert set(endpoint.keys) == {"Bearer sesame"}


def test_key_is_never_logged(
    endpoint: Endpoint, connect: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("REMOTE_KEY", "sesame-4711")
    caplog.set_level(logging.DEBUG)
    endpoint.script = lambda body: refused(401, "bad key")
    with pytest.raises(EngineError, match=r"refuses the key.*REMOTE_KEY") as raised:
        ask(connect(api_key_env="REMOTE_KEY"), "hello")
    assert "4711" not in caplog.text + str(raised.value)


def test_missing_key_is_named_before_anything_is_sent(endpoint: Endpoint, connect: Any) -> None:
    with pytest.raises(EngineError, match="REMOTE_KEY_THAT_IS_NOT_SET"):
        ask(connect(api_key_env="REMOTE_KEY_THAT_IS_NOT_SET"), "hello")
    assert not endpoint.asked


def test_cache_salt_and_extra_body_only_where_asked_for(endpoint: Endpoint, connect: Any) -> None:
    ask(connect(engine_args={"cache_salt": True, "extra_body": {"chat_template_kwargs": {"x": 1}}}), "hello")
    assert endpoint.asked[0]["cache_salt"] == "tenant-7"
    assert endpoint.asked[0]["chat_template_kwargs"] == {"x": 1}


def test_response_format_is_sent_and_the_answer_checked(endpoint: Endpoint, connect: Any) -> None:
    schema = '{"type":"object","required":["a"]}'
    endpoint.script = lambda body: said('{"a": 1}' if body["messages"][0]["content"] == "good" else '{"b": 1}')
    good, bad = ask(connect(), "good", "bad", schema=schema)
    assert (code(good), code(bad)) == (None, "schema_mismatch")
    assert endpoint.asked[0]["response_format"]["json_schema"]["schema"] == json.loads(schema)


def test_length_is_truncated_unless_the_caller_asked(endpoint: Endpoint, connect: Any) -> None:
    endpoint.script = lambda body: said("cut", "length", tokens=body["max_tokens"])
    engine = connect()
    (own,) = ask(engine, "x")
    (callers,) = ask(engine, "x", max_tokens=3)
    assert (code(own), own.text) == ("truncated", "cut")
    assert (code(callers), callers.finish_reason) == (None, "length")
    endpoint.script = lambda body: said("cut", "model_length")
    (full,) = ask(engine, "x", max_tokens=9)
    assert (full.text, full.finish_reason, code(full)) == ("cut", "length", "truncated")


def test_a_guess_of_usage_keeps_within_the_limit_of_the_row(endpoint: Endpoint, connect: Any) -> None:
    """A cap has reserved no more for it."""

    def long(body: dict[str, Any]) -> Reply:
        if "max_tokens" in body and body["messages"][0]["content"] == "full":
            return refused(400, "maximum context length is 60 tokens")
        reply = said("supercalifragilistic " * 50, "length" if "max_tokens" in body else "stop")
        del reply[1]["usage"]
        return reply

    endpoint.script = long
    engine = connect()
    (callers,), (own, full) = ask(engine, "x", max_tokens=7), ask(engine, "x", "full")
    assert [a.usage.completion_tokens for a in (callers, own, full)] == [7, 50, 50]
    assert (code(callers), code(own), code(full)) == (None, "truncated", None)


@pytest.mark.parametrize(
    ("content", "expected"), [([{"type": "text", "text": "a"}, {"type": "thinking"}], "a"), ([], ""), (None, "")]
)
def test_content_in_parts_is_their_text(endpoint: Endpoint, connect: Any, content: Any, expected: str) -> None:
    endpoint.script = lambda body: said(content)
    (answer,) = ask(connect(), "x")
    assert (answer.text, answer.error) == (expected, None)


@pytest.mark.parametrize(
    "usage", [{"prompt_tokens": "n/a"}, {"prompt_tokens": [1]}, {"completion_tokens": math.inf}, "none", [1], 7]
)
def test_usage_that_is_none_is_guessed(endpoint: Endpoint, connect: Any, usage: Any) -> None:
    reply = said("seven b")
    reply[1]["usage"] = usage
    endpoint.script = lambda body: reply
    (answer,) = ask(connect(), "seven b")
    assert (answer.text, answer.error, answer.usage) == ("seven b", None, Usage(2, 0, 2))


@pytest.mark.parametrize("reason", ["abort", "error", "time_limit", "cancelled", "insufficient_system_resource"])
def test_an_answer_that_was_not_finished_is_a_row_error(endpoint: Endpoint, connect: Any, reason: str) -> None:
    endpoint.script = lambda body: said("half an ans", reason)
    (answer,) = ask(connect(), "x", max_tokens=2)
    assert (answer.text, answer.finish_reason, code(answer)) == ("half an ans", reason, "invalid_request")
    assert repr(reason) in str(answer.error)
    assert answer.usage.completion_tokens == 2


@pytest.mark.parametrize("reason", [None, "", "stop", "STOP", "eos", "eos_token", "stop_sequence", "end_turn"])
def test_an_answer_that_is_whole_by_any_name(endpoint: Endpoint, connect: Any, reason: Any) -> None:
    endpoint.script = lambda body: said("whole", reason)
    (answer,) = ask(connect(), "x")
    assert (answer.text, answer.finish_reason, answer.error) == ("whole", reason, None)


def test_a_refusal_is_no_answer(endpoint: Endpoint, connect: Any) -> None:
    reply = said("")
    reply[1]["choices"][0]["message"] = {"content": None, "refusal": "I cannot help"}
    endpoint.script = lambda body: reply
    (answer,) = ask(connect(), "x")
    assert (answer.text, code(answer), answer.usage.completion_tokens) == (None, "blocked", 2)
    assert "I cannot help" in str(answer.error)


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (
            refused(400, "This model's maximum context length is 4096 tokens", "context_length_exceeded"),
            "prompt_too_long",
        ),
        (refused(400, "The decoder prompt (length 5000) is longer than the maximum model length"), "prompt_too_long"),
        (refused(413, "Payload Too Large"), "prompt_too_long"),
        (refused(400, "flagged", "content_filter"), "blocked"),
        (refused(422, "messages: field required"), "invalid_request"),
        (refused(500, "out of ideas"), "invalid_request"),
        (said("", "content_filter"), "blocked"),
        (refused(200, "upstream overloaded"), "invalid_request"),
        (refused(200, "prompt is too long"), "prompt_too_long"),
    ],
)
def test_refusals_of_one_row(endpoint: Endpoint, connect: Any, reply: Reply, expected: str) -> None:
    endpoint.script = lambda body: reply if body["messages"][0]["content"] == "bad" else said("fine")
    good, bad = ask(connect(), "good", "bad")
    assert (code(good), code(bad)) == (None, expected)


def test_answer_gets_what_room_there_is(endpoint: Endpoint, connect: Any) -> None:
    """Prompt and default limit are too much together: asked again without the limit, and only then."""
    endpoint.script = lambda body: (
        refused(400, "'max_tokens' is too large: 50. This model's maximum context length is 60 tokens")
        if "max_tokens" in body
        else said("short")
    )
    (answer,) = ask(connect(), "x")
    assert (answer.text, answer.error, len(endpoint.asked)) == ("short", None, 2)


def test_busy_endpoint_is_waited_for_as_it_says(endpoint: Endpoint, connect: Any) -> None:
    turns = itertools.count()
    endpoint.script = lambda body: refused(429, "slow down", Retry_After="0.3") if next(turns) < 2 else said("now")
    began = time.monotonic()
    (answer,) = ask(connect(), "x")
    assert answer.text == "now"
    assert time.monotonic() - began >= 0.6
    assert len(endpoint.asked) == 3


def test_endpoint_that_stays_busy_is_an_engine_error(endpoint: Endpoint, connect: Any) -> None:
    endpoint.script = lambda body: refused(503, "full", Retry_After="100000")
    with pytest.raises(EngineBusyError, match="stays busy"):
        ask(connect(), "x")
    assert len(endpoint.asked) == 1


def test_an_endpoint_that_serves_others_is_waited_for(endpoint: Endpoint, connect: Any) -> None:
    """Its rate limit lets one row through at a time: each of many rows is refused more often than it would be alone."""
    served = [0.0]

    def limited(body: dict[str, Any]) -> Reply:
        with endpoint.lock:
            if time.monotonic() - served[0] < 0.1:
                return refused(429, "rate limit", Retry_After="0.1")
            served[0] = time.monotonic()
        return said("fine")

    endpoint.script = limited
    assert [code(answer) for answer in ask(connect(), *map(str, range(25)))] == [None] * 25


def test_rows_that_wait_wake_up_apart(endpoint: Endpoint) -> None:
    async def woken() -> list[float]:
        busy = http_chat.Endpoint(Model("m", "m"), endpoint.url, httpx.AsyncClient())
        busy.pause, busy.quiet_until = 0.4, (until := time.monotonic() + 0.4)

        async def wait() -> float:
            await busy.quiet()
            return time.monotonic() - until

        found = await asyncio.gather(*(wait() for _ in range(40)))
        await busy.close()
        return found

    times = asyncio.run(woken())
    assert min(times) >= 0
    assert max(times) - min(times) > 0.2


def test_only_time_bounds_the_wait(endpoint: Endpoint, connect: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It counts from the last reply to any row, and a wait that nobody names grows with it."""
    monkeypatch.setattr(http_chat, "WAIT_S", 1.0)
    monkeypatch.setattr(http_chat, "FIRST_WAIT_S", 0.05)
    turns = itertools.count()

    def script(body: dict[str, Any]) -> Reply:
        if body["messages"][0]["content"] == "other":
            return said("fine")
        return said("at last") if next(turns) == 12 else refused(429, "full", Retry_After="0.1")

    endpoint.script = script
    engine = connect()
    others = threading.Thread(target=lambda: [(ask(engine, "other"), time.sleep(0.1)) for _ in range(20)])
    others.start()
    assert ask(engine, "x")[0].text == "at last"
    others.join()
    endpoint.script = lambda body: refused(429, "full")
    asked, began = len(endpoint.asked), time.monotonic()
    with pytest.raises(EngineBusyError, match="stays busy"):
        ask(engine, "x")
    assert time.monotonic() - began < 1.5
    assert len(endpoint.asked) - asked < 8


def test_unknown_model_names_what_is_served(endpoint: Endpoint, connect: Any) -> None:
    endpoint.script = lambda body: refused(404, "The model does not exist")
    with pytest.raises(EngineError, match="It serves 'served-model'"):
        ask(connect(engine_args={"served_name": "other"}), "x")


def test_nobody_at_the_url_names_it(connect: Any) -> None:
    with pytest.raises(EngineError, match=r"Nobody answers at http://127.0.0.1:9/v1"):
        ask(connect(url="http://127.0.0.1:9/v1"), "x")


@pytest.mark.parametrize("url", [None, "localhost:8000", "ftp://host/v1"])
def test_url_must_be_http(tmp_path: Any, url: str | None) -> None:
    with pytest.raises(RequestError, match="http"):
        open_engine(Model("remote", "m", url=url, engine="http"), Settings(tmp_path, None, None))


@pytest.mark.parametrize("found", [{"hello": "world"}, {"error": None}, [1], said(7)[1]])
def test_what_is_no_endpoint_is_said(endpoint: Endpoint, connect: Any, found: Any) -> None:
    endpoint.script = lambda body: (200, found, {})
    with pytest.raises(EngineError, match="no OpenAI-compatible endpoint"):
        ask(connect(), "x")


def test_timeout_is_a_row_error(endpoint: Endpoint, connect: Any) -> None:
    def slow(body: dict[str, Any]) -> Reply:
        time.sleep(1.0 if body["messages"][0]["content"] == "slow" else 0)
        return said("done")

    endpoint.script = slow
    slow_one, quick = ask(connect(engine_args={"timeout": 0.3}), "slow", "quick")
    assert (code(slow_one), code(quick)) == ("timeout", None)


def test_lone_surrogate_and_no_messages_fail_alone(endpoint: Endpoint, connect: Any) -> None:
    bad, none, good = ask(connect(), "a\ud800b", (), "good")
    assert (code(bad), code(none), code(good)) == ("invalid_request", "invalid_request", None)
    assert len(endpoint.asked) == 1


def test_concurrency_is_bounded_and_requests_are_drawn_as_they_are_needed(endpoint: Endpoint, connect: Any) -> None:
    drawn = 0

    def endless() -> Iterator[CompletionRequest]:
        nonlocal drawn
        for n in itertools.count():
            drawn += 1
            yield CompletionRequest("remote", f"row {n}")

    def brief(body: dict[str, Any]) -> Reply:
        time.sleep(0.01)
        return said(body["messages"][0]["content"])

    endpoint.script = brief
    stream = connect(engine_args={"concurrency": 4}).stream(endless(), "me")
    seen = [next(stream) for _ in range(40)]
    stream.close()
    assert drawn <= 44
    assert endpoint.most <= 4
    assert all(completion.text == f"row {number}" for number, completion in seen)


def test_closing_the_stream_hangs_up(endpoint: Endpoint, connect: Any) -> None:
    """What is in flight is cancelled: the endpoint sees its client go and can stop computing."""

    def slow_after_first(body: dict[str, Any]) -> Reply:
        if body["messages"][0]["content"] != "0":
            time.sleep(0.5)
        return 200, {**said("x" * 2_000_000)[1]}, {}

    endpoint.script = slow_after_first
    stream = connect(engine_args={"concurrency": 4}).stream(
        (CompletionRequest("remote", str(n)) for n in range(8)), "me"
    )
    next(stream)
    began = time.monotonic()
    stream.close()
    assert time.monotonic() - began < 0.2
    until = time.monotonic() + 20
    while endpoint.hung_up < 3 and time.monotonic() < until:
        time.sleep(0.05)
    assert endpoint.hung_up >= 3
    assert len(endpoint.asked) <= 5


class Rows(list[CompletionRequest]):
    """Requests whose consumer may leave."""

    abandoned = False


def one_refused(body: dict[str, Any]) -> Reply:
    if body["messages"][0]["content"] == "2":
        return refused(401, "quota of the key")
    time.sleep(0.3)
    return said("paid")


def test_a_failure_is_raised_behind_the_answers_in_flight(endpoint: Endpoint, connect: Any) -> None:
    endpoint.script = one_refused
    engine = connect(engine_args={"concurrency": 5})
    got: list[tuple[int, str | None]] = []
    with pytest.raises(EngineError, match="refuses the key"):
        got.extend((n, c.text) for n, c in engine.stream([CompletionRequest("m", str(n)) for n in range(9)], "me"))
    assert sorted(got) == [(n, "paid") for n in (0, 1, 3, 4)]
    assert len(endpoint.asked) == 5


def test_nobody_waits_for_the_answers_in_flight_who_has_left(endpoint: Endpoint, connect: Any) -> None:
    endpoint.script = one_refused
    rows = Rows(CompletionRequest("m", str(n)) for n in range(5))
    stream = connect(engine_args={"concurrency": 5}).stream(rows, "me")
    next(stream)
    rows.abandoned = True
    assert list(stream) == []


def test_threads_share_one_engine(endpoint: Endpoint, connect: Any) -> None:
    engine = connect()
    found: dict[int, list[Completion]] = {}
    threads = [
        threading.Thread(target=lambda n=n: found.update({n: ask(engine, *(f"{n} {m}" for m in range(20)))}))
        for n in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all([c.text for c in found[n]] == [f"{n} {m}" for m in range(20)] for n in range(6))


def test_count_tokens_by_the_endpoint(endpoint: Endpoint, connect: Any) -> None:
    endpoint.script = lambda body: (200, {"count": len(body["prompt"].split())}, {})
    assert connect().count_tokens(["one two three", ""]) == [3, 0]
