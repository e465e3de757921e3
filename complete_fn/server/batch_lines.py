"""A batch's request lines are checked before anything runs, and its answer lines are written in OpenAI's form."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import ValidationError

from complete_fn.engines.call import Call
from complete_fn.errors import CompleteError, InputError, TooLargeError
from complete_fn.interrupts import end_if_abandoned
from complete_fn.jobs.job import Job
from complete_fn.rows.json_values import json_line
from complete_fn.server.replies import Detail, chat_body, completion_body, refused
from complete_fn.server.request_bodies import ChatBody, CompletionBody
from complete_fn.service.job_files import PromptGroup
from complete_fn.service.state import ServiceState
from complete_fn.text import is_utf8, text_column

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MOST_KINDS = 1_000  # different models and settings in one batch, because each needs its own run
NEVER_RUN = {"expired": "batch_expired", "cancelled": "batch_cancelled"}


@dataclass(frozen=True, slots=True)
class Line:
    """One request of a batch."""

    custom_id: str
    call: Call
    prompt: str


def read_lines(state: ServiceState, source: bytes, endpoint: str) -> list[Line]:
    """Raises:
    InputError: A line cannot be run; the message has its number.
    TooLargeError: The batch has more lines than a batch may have.
    """
    lines: list[Line] = []
    seen: dict[str, int] = {}
    for number, raw in enumerate(source.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not raw.strip():
            continue
        end_if_abandoned()
        if len(lines) == state.limits.batch_rows:
            raise TooLargeError(f"The batch has more than {state.limits.batch_rows:,} requests. Split it.")
        try:
            line = read_line(state, raw, endpoint)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(step) for step in ("body", *first["loc"]))
            raise InputError(f"Line {number}: {place}: {first['msg']}.") from error
        except (CompleteError, ValueError, RecursionError) as error:
            raise InputError(f"Line {number}: {error or 'nested too deep'}") from error
        if line.custom_id in seen:
            raise InputError(f"Line {number}: custom_id {line.custom_id!r} is that of line {seen[line.custom_id]} too.")
        seen[line.custom_id] = number
        lines.append(line)
    if not lines:
        raise InputError("The batch has no requests.")
    return lines


def read_line(state: ServiceState, raw: bytes, endpoint: str) -> Line:
    found = json.loads(raw)
    if not isinstance(found, dict):
        raise ValueError(f"it is no object but {type(found).__name__}.")
    name = found.get("custom_id")
    if not isinstance(name, str) or not 0 < len(name) <= 512:
        raise ValueError("custom_id must be a text of 1 to 512 characters.")
    if not is_utf8(name):
        raise ValueError(f"custom_id {name!r} has half of a character (a lone surrogate).")
    if found.get("method") != "POST" or found.get("url") != endpoint:
        raise ValueError(f"method and url must be 'POST' and the batch's endpoint, {endpoint!r}.")
    body = found.get("body")
    if endpoint == CHAT:
        chat = ChatBody.model_validate(body)
        refuse_stream(chat.stream)
        return Line(name, chat.chat_call(state.model(chat.model)), chat.prompt())
    plain = CompletionBody.model_validate(body)
    refuse_stream(plain.stream)
    if not isinstance(plain.prompt, str):
        raise ValueError("prompt must be one text in a batch.")
    return Line(name, plain.completion_call(state.model(plain.model)), plain.texts()[0])


def refuse_stream(stream: bool) -> None:
    if stream:
        raise ValueError("stream is nothing for a batch.")


def groups(lines: Sequence[Line]) -> list[PromptGroup]:
    """The lines in groups, each of which one run can answer.

    Raises:
        InputError: The batch has too many different models and settings.
    """
    rows: dict[tuple[str, str], list[int]] = {}
    for number, line in enumerate(lines):
        rows.setdefault((line.call.model.name, options(line.call)), []).append(number)
    if len(rows) > MOST_KINDS:
        raise InputError(f"The batch has {len(rows):,} different models and settings; {MOST_KINDS:,} are taken.")
    return [
        PromptGroup(
            lines[numbers[0]].call.model,
            json.loads(given),
            np.array(numbers),
            pa.chunked_array([text_column([lines[n].prompt for n in numbers])]),
        )
        for (_, given), numbers in rows.items()
    ]


def options(call: Call) -> str:
    """The call's options as JSON text, in the form that `parse_options` takes."""
    given = {**asdict(call.sampling), "response_format": call.response_format}
    return json.dumps({k: v for k, v in given.items() if v not in (None, ())}, sort_keys=True)


def answer_lines(job: Job, source: bytes, details: Sequence[Detail | None]) -> Iterator[tuple[bool, bytes]]:
    """(whether it is an answer, the line) for each request, in order: lines of the output file and the error file."""
    requests = (json.loads(raw) for raw in source.removeprefix(b"\xef\xbb\xbf").split(b"\n") if raw.strip())
    for number, (asked, row) in enumerate(zip(requests, details, strict=True)):
        name = f"{job.id}_{number}"
        line: dict[str, Any] = {"id": name, "custom_id": asked["custom_id"], "response": None, "error": None}
        why = None if row is None else refused(row)
        if row is None or (why is not None and why[2] == "cancelled"):
            code = NEVER_RUN.get(job.status, "batch_failed")
            lost = "The answer's file is missing or damaged. Send the line again; a stored answer costs nothing."
            never = lost if job.status == "completed" else f"The batch was {job.status} before this was done."
            line["error"] = {"code": code, "message": job.error or never}
        elif why is not None:
            status, message, code = why
            body: Any = {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": code}}
            line["response"] = {"status_code": status, "request_id": name, "body": body}
        else:
            model = asked["body"]["model"]
            body = chat_body(model, row) if asked["url"] == CHAT else completion_body(model, [row])
            line["response"] = {"status_code": 200, "request_id": name, "body": body}
        good = line["error"] is None and why is None
        yield good, json_line(line).encode("utf-8", "backslashreplace") + b"\n"  # a lone surrogate becomes an escape
