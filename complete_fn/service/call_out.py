"""A warehouse's call-out, in any dialect, sends rows of arguments and gets one value for each row."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from complete_fn.engines.call import Call
from complete_fn.errors import CompleteError, InputError, InvalidOptionError, UnknownModelError
from complete_fn.prompts.options import CacheMode, parse_options
from complete_fn.prompts.schema_rules import refuse_patterns
from complete_fn.prompts.templates import escape, pack_messages
from complete_fn.service.state import ServiceState

ARGUMENTS = "complete(model, prompt [, options])"
FUNCTIONS = ("complete", "complete_details")  # return a row's answer as text; all its details as JSON
ROLES = ("system", "user", "assistant")
Detail = dict[str, Any]  # one row of `Answers.details`


@dataclass(frozen=True, slots=True)
class CallOut:
    """One request of a warehouse.

    Attributes:
        batch: the warehouse's name for the request, the same each time it sends the request.
        rows: [n] the arguments of each row.
        numbers: [n] the warehouse's own row numbers, which go back with the values; empty where it has none.
        query_tag: the warehouse's query, for the ledger.
    """

    batch: str
    rows: Sequence[Sequence[Any]]
    numbers: Sequence[Any] = ()
    query_tag: str | None = None


@dataclass(frozen=True, slots=True)
class Reply:
    """A body with its status and headers."""

    status: int
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)


class Dialect(Protocol):
    """Translates a warehouse's requests into `CallOut`, and values into replies; does nothing else.

    Attributes:
        seconds: how long the warehouse waits for a batch in all. Rows not answered by then get a row error.
        patience: seconds for which one request may stay open. After them the reply is 202, and the warehouse asks
            again with GET.
    """

    seconds: float
    patience: float

    def batch(self, headers: Mapping[str, str]) -> str:
        """The batch that a GET or DELETE names.

        Raises:
            InputError: The request names no batch, or this warehouse sends no such requests.
        """
        ...

    def read(self, body: bytes, headers: Mapping[str, str]) -> CallOut:
        """The call-out in a body.

        Raises:
            InputError: The body is not in this dialect; the message says where.
        """
        ...

    def write(self, asked: CallOut, values: Sequence[Any]) -> Reply:
        """The reply with [n] values, each a text, None or the row's details."""
        ...

    def refuse(self, error: CompleteError) -> Reply:
        """The reply to a request that failed. Its status makes the warehouse try again only where that can help."""
        ...

    def busy(self, batch: str) -> Reply:
        """The reply while the batch is not done."""
        ...


@dataclass
class Share:
    """Rows of a call-out that one run can answer."""

    model: str
    options: str
    call: Call
    cache: CacheMode
    rows: list[int] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)


def shares(state: ServiceState, rows: Sequence[Sequence[Any]]) -> list[Share]:
    """The rows, grouped by model and options, without the rows whose model or prompt is NULL.

    Raises:
        InputError: A row does not have two or three arguments, or an argument has a wrong type.
        UnknownModelError, InvalidOptionError: As in `complete`; nothing was run.
    """
    found: dict[tuple[str, str], Share] = {}
    for number, row in enumerate(rows):
        if not isinstance(row, list) or not 2 <= len(row) <= 3:
            count = len(row) if isinstance(row, list) else "no list of"
            raise InputError(f"Row {number} has {count} arguments. Write {ARGUMENTS}.")
        model, prompt = row[:2]
        if model is None or prompt is None:
            continue
        if not isinstance(model, str):
            raise InputError(f"Row {number}: the model is {kind(model)}, not text. Write {ARGUMENTS}.")
        options = option_text(row[2] if len(row) == 3 else None, number)
        share = found.get((model, options))
        if share is None:
            share = found[model, options] = new_share(state, model, options)
        share.rows.append(number)
        share.prompts.append(prompt_text(prompt, number))
    return list(found.values())


def new_share(state: ServiceState, model: str, options: str) -> Share:
    given = json.loads(options)
    if "strict" in given:
        raise InvalidOptionError("'strict' is no option here: a row that fails is NULL, and complete_details says why.")
    parsed = parse_options(given)
    refuse_patterns(parsed.response_format)
    return Share(model, options, Call.of(state.model(model), parsed), parsed.cache)


def option_text(given: Any, number: int) -> str:
    """Options as canonical JSON; warehouses without objects send them as text."""
    if isinstance(given, str):
        try:
            given = json.loads(given) if given.strip() else None
        except (ValueError, RecursionError) as error:
            raise InvalidOptionError(f"Row {number}: the options are no JSON object: {error}.") from error
    if given is None:
        return "{}"
    if not isinstance(given, dict):
        raise InvalidOptionError(f"Row {number}: the options are {kind(given)}, not an object.")
    return json.dumps(given, sort_keys=True)


def prompt_text(given: Any, number: int) -> str:
    """A prompt as `run` takes it: text, a scalar as its text, or a list of messages."""
    if isinstance(given, str):
        return escape(given)
    if isinstance(given, bool | int | float):
        return json.dumps(given)
    if isinstance(given, list) and given and all(is_message(m) for m in given):
        return pack_messages(given)
    raise InputError(
        f"Row {number}: the prompt is {kind(given)}; it must be text or an array of objects with role "
        f"({', '.join(ROLES)}) and content."
    )


def is_message(given: Any) -> bool:
    return isinstance(given, dict) and given.get("role") in ROLES and isinstance(given.get("content"), str)


def kind(value: Any) -> str:
    return {dict: "an object", list: "an array", str: "text", bool: "a boolean"}.get(type(value), "a number")


def value_of(row: Detail | None, detailed: bool) -> Any:
    """The value of a row in the reply: its text (None if it failed), or with `detailed` all its details."""
    if row is None:
        return None
    if not detailed:
        return None if row["error"] else row["value"]
    return {**row, "cost": f"{row['cost']:.9f}"}


def body_object(body: bytes, what: str) -> dict[str, Any]:
    """The body's JSON object.

    Raises:
        InputError: The body is not a JSON object.
    """
    try:
        found = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise InputError(f"The body is not JSON: {error}.") from error
    if not isinstance(found, dict):
        raise InputError(f"The body is {kind(found)}; {what}.")
    return found


def rows_of(found: dict[str, Any], name: str) -> list[Any]:
    rows = found.get(name)
    if not isinstance(rows, list):
        raise InputError(f"The body has no array {name!r}.")
    return rows


def for_good(error: CompleteError) -> int:
    """The HTTP status of an error in a reply to a warehouse.

    It is 400 instead of 404, 409 or 501, because the same request would fail again: service functions and Cloud Run
    take a 404 for a service that has not started yet, and try again. Other statuses stay, a refused key's 401 too.
    """
    return 400 if isinstance(error, UnknownModelError) or error.status in (404, 409, 501) else error.status


def batch_name(given: Any) -> str:
    """The name of a batch.

    Raises:
        InputError: The name is not a text of 1 to 255 printable characters.
    """
    if not isinstance(given, str) or not 0 < len(given) <= 255 or not given.isprintable():
        raise InputError("The batch has no name of 1 to 255 printable characters.")
    return given


def json_reply(status: int, content: Any, headers: Mapping[str, str] | None = None) -> Reply:
    body = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
    return Reply(status, body, {"Content-Type": "application/json", **(headers or {})})
