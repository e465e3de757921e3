"""Batches through the real `openai` client: answers, errors, statuses, what is refused at once."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import openai
import pytest

from complete_fn import EchoEngine
from complete_fn.server.batch_lines import Line, read_line
from complete_fn.server.routes.openai.batches import OUTPUTS, REQUESTS
from complete_fn.service.state import Limits, ServiceState
from complete_fn.types import Completion, CompletionRequest
from tests.clocks import pass_time

CHAT = "/v1/chat/completions"


def request(name: str, text: str, url: str = CHAT, **body: Any) -> dict[str, Any]:
    asked = {"messages": [{"role": "user", "content": text}]} if url == CHAT else {"prompt": text}
    return {"custom_id": name, "method": "POST", "url": url, "body": {"model": "echo", **asked, **body}}


def start(client: openai.OpenAI, lines: list[Any], endpoint: Any = CHAT, **more: Any) -> Any:
    content = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    file = client.files.create(file=("batch.jsonl", io.BytesIO(content.encode())), purpose="batch")
    return client.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window="24h", **more)


def wait(client: openai.OpenAI, batch: str, status: str = "completed") -> Any:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        found = client.batches.retrieve(batch)
        if found.status == status:
            return found
        time.sleep(0.05)
    raise AssertionError(found)


def lines_of(client: openai.OpenAI, file: str | None) -> dict[str, Any]:
    assert file is not None
    return {line["custom_id"]: line for line in map(json.loads, client.files.content(file).text.splitlines())}


def test_a_batch_answers_each_request_by_its_own_settings(running: Any) -> None:
    client = running.openai()
    lines = [
        request("a", "one two three"),
        request("b", "one two three", max_tokens=1),
        request("c", "x", model="other"),
        request("long", "w " * 100),
    ]
    batch = start(client, lines, metadata={"night": "1"})
    done = wait(client, batch.id)
    answers = lines_of(client, done.output_file_id)
    texts = {name: line["response"]["body"]["choices"][0]["message"]["content"] for name, line in answers.items()}
    assert texts == {"a": "one two three", "b": "one", "c": "x"}
    assert answers["b"]["response"]["body"]["choices"][0]["finish_reason"] == "length"
    assert answers["c"]["response"]["body"]["model"] == "other"
    assert answers["a"]["response"]["body"]["usage"]["total_tokens"] == 6
    errors = lines_of(client, done.error_file_id)
    assert errors["long"]["response"]["body"]["error"]["code"] == "context_length_exceeded"
    counts = done.request_counts
    assert (counts.total, counts.completed, counts.failed) == (4, 3, 1)
    assert (done.metadata, done.endpoint, done.errors) == ({"night": "1"}, CHAT, None)
    assert [b.id for b in client.batches.list()] == [batch.id]
    assert done.output_file_id in {f.id for f in client.files.list(purpose="batch_output")}


def test_completions_are_batched_too(running: Any) -> None:
    client = running.openai()
    batch = start(client, [request("a", "one two", "/v1/completions")], "/v1/completions")
    done = wait(client, batch.id)
    assert lines_of(client, done.output_file_id)["a"]["response"]["body"]["choices"][0]["text"] == "one two"
    assert done.error_file_id is None


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (request("a", "again"), "custom_id 'a' is that of line 1 too"),
        ("{broken", "Line 2"),
        ("[]", "no object"),
        ({**request("b", "x"), "url": "/v1/embeddings"}, "endpoint"),
        ({**request("b", "x"), "method": "GET"}, "method"),
        ({**request("b", "x"), "custom_id": 7}, "custom_id"),
        ({**request("b", "x"), "custom_id": "b\ud83d"}, "custom_id 'b\\ud83d' has half of a character"),
        (request("b", "x", model="/etc/passwd"), "catalogue"),
        (request("b", "x", stream=True), "stream"),
        (request("b", "x", tools=[]), "body.tools"),
        (request("b", "x", temperature=9), "temperature"),
        ({**request("b", "x"), "body": None}, "body"),
        ('{"custom_id": ' + "[" * 100_000, "recursion"),
    ],
)
def test_a_line_that_cannot_run_is_refused_at_once_by_number(shared: Any, line: Any, words: str) -> None:
    client = shared.openai()
    with pytest.raises(openai.BadRequestError) as caught:
        start(client, [request("a", "x"), line])
    assert "Line 2" in caught.value.message
    assert words in caught.value.message
    assert client.batches.list().data == []


def test_other_refusals(serve: Callable[..., Any]) -> None:
    client = serve(limits=Limits(batch_rows=2)).openai()
    with pytest.raises(openai.BadRequestError):
        start(client, [""])
    with pytest.raises(openai.BadRequestError):
        start(client, [request("a", "x")], "/v1/embeddings")
    with pytest.raises(openai.APIStatusError) as caught:
        start(client, [request(str(n), "x") for n in range(3)])
    assert caught.value.status_code == 413
    file = client.files.create(file=("t.jsonl", b"{}"), purpose="user_data")
    with pytest.raises(openai.BadRequestError):
        client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
    with pytest.raises(openai.NotFoundError):
        client.batches.retrieve("batch_none")


def test_a_batch_whose_files_are_gone_fails_no_list(running: Any) -> None:
    client = running.openai()
    batches = [start(client, [request("a", f"words {n}")]).id for n in range(2)]
    for batch in batches:
        wait(client, batch)
    for name in (REQUESTS, OUTPUTS):
        running.state.storage.delete(running.state.job_key(batches[0], name))
    good, broken = client.batches.list().data
    assert (good.id, good.errors, broken.id, broken.output_file_id) == (batches[1], None, batches[0], None)
    assert good.output_file_id is not None
    assert [error.code for error in broken.errors.data] == ["file_damaged"]
    with pytest.raises(openai.InternalServerError, match=r"requests\.jsonl of batch_.* is missing or damaged"):
        client.batches.retrieve(batches[0])


def test_a_paid_batch_with_half_a_character_in_a_custom_id_can_be_read(
    running: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def taken(state: ServiceState, raw: bytes, endpoint: str) -> Line:
        """As lines were read before they were refused for it."""
        found = json.loads(raw)
        return replace(read_line(state, raw.replace(b"\\ud83d", b""), endpoint), custom_id=found["custom_id"])

    monkeypatch.setattr("complete_fn.server.batch_lines.read_line", taken)
    client = running.openai()
    done = wait(client, start(client, [request("a", "good"), request("b\ud83d", "paid")]).id)
    assert set(lines_of(client, done.output_file_id)) == {"a", "b\ud83d"}


class Slow(EchoEngine):
    def stream(self, requests: Iterable[CompletionRequest], tenant: str) -> Iterator[tuple[int, Completion]]:
        for found in super().stream(requests, tenant):
            time.sleep(0.02)
            yield found


@pytest.mark.parametrize("how", ["cancelled", "expired"])
def test_a_batch_that_ends_early_keeps_its_finished_rows(serve: Callable[..., Any], how: str) -> None:
    engine = Slow(64)
    running = serve(engine)
    client = running.openai()
    batch = start(client, [request(str(n), f"row {n}") for n in range(1000)])
    while len(engine.requests) < 50:
        time.sleep(0.05)
    if how == "cancelled":
        assert client.batches.cancel(batch.id).status in ("cancelling", "cancelled")
    else:
        pass_time(running.state.store, 86_401)
        assert running.state.jobs.expire() == [batch.id]
    done = wait(client, batch.id, how)
    answers, errors = lines_of(client, done.output_file_id), lines_of(client, done.error_file_id)
    assert len(answers) + len(errors) == 1000
    assert 30 < len(answers) < 1000
    assert {line["error"]["code"] for line in errors.values()} == {f"batch_{how}"}
    assert all(answers[n]["response"]["body"]["choices"][0]["message"]["content"] == f"row {n}" for n in answers)
    assert done.request_counts.completed == len(answers)
