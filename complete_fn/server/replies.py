"""Rows as OpenAI's replies: chat completions and completions, whole or as server-sent events."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator, Sequence
from typing import Any

Detail = dict[str, Any]  # one row of `Answers.details`

# What a row's error is as a status of its request, and OpenAI's word for it where there is one.
STATUS = {
    "prompt_too_long": (400, "context_length_exceeded"),
    "invalid_request": (400, "invalid_request"),
    "schema_mismatch": (422, "schema_mismatch"),
    "budget_exceeded": (402, "budget_exceeded"),
    "blocked": (400, "content_filter"),
    "timeout": (504, "timeout"),
    "cancelled": (409, "cancelled"),
}


def refused(row: Detail) -> tuple[int, str, str] | None:
    """(status, message, code) of a row without an answer. Cut by the context or by max_tokens is an answer here."""
    error = row["error"]
    if error is None or (row["value"] is not None and row["finish_reason"] == "length"):
        return None
    status, code = STATUS.get(error["code"], (400, error["code"]))
    return status, error["message"], code


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
        {"index": n, "text": row["value"], "logprobs": None, "finish_reason": row["finish_reason"]}
        for n, row in enumerate(rows)
    ]
    return {**head("text_completion", "cmpl", model), "choices": choices, "usage": usage_body(rows)}


def chat_events(model: str, row: Detail, with_usage: bool) -> Iterator[str]:
    """The answer in OpenAI's stream form. The text comes in one piece: the engine tells of finished rows only."""
    start = head("chat.completion.chunk", "chatcmpl", model)

    def chunk(delta: Detail, reason: str | None = None) -> Detail:
        return {**start, "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}]}

    yield event(chunk({"role": "assistant", "content": ""}))
    yield event(chunk({"content": row["value"]}))
    yield event(chunk({}, row["finish_reason"]))
    if with_usage:
        yield event({**start, "choices": [], "usage": usage_body([row])})
    yield "data: [DONE]\n\n"


def completion_events(model: str, rows: Sequence[Detail], with_usage: bool) -> Iterator[str]:
    whole = completion_body(model, rows)
    usage = whole.pop("usage")
    yield event(whole)
    if with_usage:
        yield event({**whole, "choices": [], "usage": usage})
    yield "data: [DONE]\n\n"


def event(body: Detail) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"
