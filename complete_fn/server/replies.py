"""Rows become OpenAI's replies: chat completions and completions, whole or as server-sent events."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from complete_fn.rows.json_values import json_line
from complete_fn.server.error_replies import error_body

Detail = dict[str, Any]  # one row of `Answers.details`

# By a row's error code: the status of the request, and OpenAI's own code if it has one.
STATUS = {
    "prompt_too_long": (400, "context_length_exceeded"),
    "invalid_request": (400, "invalid_request"),
    "schema_mismatch": (422, "schema_mismatch"),
    "budget_exceeded": (402, "budget_exceeded"),
    "blocked": (400, "content_filter"),
    "timeout": (504, "timeout"),
    "engine_failed": (500, "engine_failed"),
    "usage_refused": (502, "usage_refused"),
    "cancelled": (409, "cancelled"),
}
OPEN: Detail = {"finish_reason": None}


def refused(row: Detail) -> tuple[int, str, str] | None:
    """(status, message, code) of a row without an answer, else None. A text cut by a length limit is an answer here."""
    error = row["error"]
    if error is None or (row["value"] is not None and row["finish_reason"] == "length"):
        return None
    status, code = STATUS.get(error["code"], (400, error["code"]))
    return status, error["message"], code


def all_refused(rows: Sequence[Detail]) -> tuple[int, str, str] | None:
    """The first row's refusal if no row has an answer. Otherwise a reply is due, because answers are paid for."""
    whys = [refused(row) for row in rows]
    return whys[0] if all(whys) else None


def ending(row: Detail) -> Detail:
    """The end of a row's choice. A row without an answer has a field `error`, which OpenAI's choices lack."""
    why = refused(row)
    if why is None:
        return {"finish_reason": row["finish_reason"]}
    return {"finish_reason": why[2] if why[2] == "content_filter" else "error", **error_body(*why)}


def usage_body(rows: Sequence[Detail]) -> Detail:
    prompt, cached, output = (
        sum(r["usage"][name] for r in rows) for name in ("prompt_tokens", "cached_tokens", "completion_tokens")
    )
    return {
        "prompt_tokens": prompt,
        "completion_tokens": output,
        "total_tokens": prompt + output,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def head(kind: str, prefix: str, model: str) -> Detail:
    return {"id": f"{prefix}-{secrets.token_hex(12)}", "object": kind, "created": int(time.time()), "model": model}


def chat_body(model: str, row: Detail) -> Detail:
    message = {"role": "assistant", "content": row["value"], "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": row["finish_reason"]}
    return {**head("chat.completion", "chatcmpl", model), "choices": [choice], "usage": usage_body([row])}


def completion_body(model: str, rows: Sequence[Detail]) -> Detail:
    choices = [
        {"index": n, "text": "" if refused(row) else row["value"], "logprobs": None, **ending(row)}
        for n, row in enumerate(rows)
    ]
    return {**head("text_completion", "cmpl", model), "choices": choices, "usage": usage_body(rows)}


@dataclass(frozen=True)
class Chunks:
    """The events of one streamed reply. With `with_usage` a last event has the usage, and the others have null."""

    kind: Literal["chat.completion.chunk", "text_completion"]
    model: str
    with_usage: bool

    @cached_property
    def head(self) -> Detail:
        start = head(self.kind, "chatcmpl" if self.of_chat else "cmpl", self.model)
        return {**start, "usage": None} if self.with_usage else start

    @property
    def of_chat(self) -> bool:
        return self.kind == "chat.completion.chunk"

    def start(self) -> Iterator[str]:
        if self.of_chat:
            yield self.choice(0, {"delta": {"role": "assistant", "content": ""}})

    def text(self, row: int, piece: str) -> str:
        return self.choice(row, {"delta": {"content": piece}} if self.of_chat else {"text": piece})

    def finish(self, row: int, how: Detail) -> str:
        return self.choice(row, {"delta": {}} if self.of_chat else {"text": ""}, how)

    def choice(self, row: int, what: Detail, how: Detail = OPEN) -> str:
        return event({**self.head, "choices": [{"index": row, **what, "logprobs": None, **how}]})

    def end(self, rows: Sequence[Detail]) -> Iterator[str]:
        if self.with_usage:
            yield event({**self.head, "choices": [], "usage": usage_body(rows)})
        yield DONE


DONE = "data: [DONE]\n\n"


def event(body: Detail) -> str:
    return f"data: {json_line(body)}\n\n"
