"""Any OpenAI-compatible endpoint serves as an engine: vLLM, Ollama, a hosted API.

`Model.url` is the address up to and including `/v1`. The API key comes from the environment variable that
`Model.api_key_env` names, and appears only in the requests. This engine reads from `Model.engine_args`:

    concurrency       requests in flight (default 16)
    timeout           seconds until a row is given up (default 600), however slowly its reply arrives
    served_name       the model's name at the endpoint (default: the checkpoint; the entry's name for a local folder,
                      and at a complete-fn service, which says so in its list of models)
    max_tokens_field  `max_tokens` (default) or `max_completion_tokens`
    cache_salt        true: send the tenant as vLLM's `cache_salt`; other endpoints may refuse the field
    choices           how labels are asked for: `json_schema` (default; an object with the label), or
                      `structured_outputs`, vLLM's own field (the bare label)
    extra_body        fields to add to every request's body

If the endpoint is busy (429, 503), the engine waits as Retry-After says, until the endpoint has served no row for two
minutes. A request that may have been paid for is never sent twice.

A reply may have 1 MiB and 2 KiB for each token that was asked for, at most 32 MiB, also when decompressed. The rest of
a longer one is not read, and its row gets the error `truncated`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import threading
from collections.abc import Coroutine, Iterable, Iterator
from typing import Any, TypeVar

import httpx

from complete_fn.engines.catalogue import Model
from complete_fn.engines.openai_chat import ACCEPTED, Endpoint
from complete_fn.engines.structured_output import checked
from complete_fn.engines.tokenizer import count_with, tokenizer_file
from complete_fn.errors import EngineError, RequestError
from complete_fn.ports import PORTS, has_port
from complete_fn.settings import Settings, secret
from complete_fn.types import Completion, CompletionRequest

CONCURRENCY, TIMEOUT_S = 16, 600.0
CLOSE_S = 2.0
LOOK_S = 0.2  # seconds between a waiting stream's checks whether it is abandoned
Number = TypeVar("Number", int, float)
Outcome = tuple[int, Completion | BaseException]


class Background:
    """An event loop in a daemon thread. Requests run there because they can be cancelled; a blocking call cannot."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.owner = os.getpid()
        threading.Thread(target=self.run, name="http-engine", daemon=True).start()

    def run(self) -> None:
        self.loop.run_forever()
        self.loop.close()

    def call(self, coroutine: Coroutine[Any, Any, Any], timeout: float | None = None) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(timeout)


def given_above_0(model: Model, name: str, default: float, kind: type[Number]) -> Number:
    """A numeric engine argument.

    Raises:
        RequestError: The argument is no number above 0.
    """
    given = model.engine_args.get(name, default)
    try:
        found = kind(given)
    except (TypeError, ValueError, OverflowError):
        found = kind(0)
    if not found > 0:
        what = "a whole number" if kind is int else "a number"
        raise RequestError(f"Model {model.name!r}: engine_args.{name} is {given!r}; it must be {what} above 0.")
    return found


class HttpEngine:
    """Chat completions over HTTP, behind the `Engine` protocol."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.concurrency = given_above_0(model, "concurrency", CONCURRENCY, int)
        self.timeout = given_above_0(model, "timeout", TIMEOUT_S, float)
        self.guard = threading.Lock()
        self.background: Background | None = None
        self.endpoint: Endpoint | None = None

    def stream(self, requests: Iterable[CompletionRequest], tenant: str) -> Iterator[tuple[int, Completion]]:
        """As in `Engine.stream`, with at most `concurrency` requests of a stream in flight.

        After a failure the stream draws no more requests. It raises the failure once the requests in flight are
        answered, because the endpoint bills them.

        Raises:
            EngineError: No server answers at the URL, the server refuses the key, or it does not serve the model.
            EngineBusyError: The endpoint stays busy for longer than this engine waits.
        """
        endpoint, background = self.open()
        feed = enumerate(requests)
        done: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        running: dict[int, tuple[CompletionRequest, Any]] = {}
        exhausted = False
        failure: BaseException | None = None
        try:
            while running or not exhausted:
                while not exhausted and len(running) < self.concurrency:
                    number, request = next(feed, (-1, None))
                    exhausted = request is None
                    if request is not None:
                        work = answer(endpoint, number, request, tenant, done)
                        running[number] = (request, asyncio.run_coroutine_threadsafe(work, background.loop))
                if getattr(requests, "abandoned", False):
                    return
                if running and (found := next_of(done)) is not None:
                    number, outcome = found
                    request, _ = running.pop(number)
                    if isinstance(outcome, BaseException):
                        failure, exhausted = failure or outcome, True
                    else:
                        yield number, checked(outcome, request)
            if failure is not None:
                raise failure
        finally:
            for _, task in running.values():
                task.cancel()

    def open(self) -> tuple[Endpoint, Background]:
        with self.guard:
            if self.endpoint is None or self.background is None or self.background.owner != os.getpid():
                self.background = Background()
                self.endpoint = self.background.call(connect(self.model, self.concurrency, self.timeout))
            return self.endpoint, self.background

    def count_tokens(self, texts: list[str]) -> list[int]:
        """Count by the tokenizer.json on this machine, or else by the endpoint's `/tokenize`, which vLLM has."""
        file = tokenizer_file(self.model)
        if file is not None:
            return count_with(file, texts)
        endpoint, background = self.open()
        counts: list[int] = background.call(endpoint.count_tokens(texts))
        return counts

    def close(self) -> None:
        with self.guard:
            background, endpoint = self.background, self.endpoint
            self.background = self.endpoint = None
        if background is not None and endpoint is not None and background.owner == os.getpid():
            with contextlib.suppress(TimeoutError):
                background.call(endpoint.close(), CLOSE_S)
            background.loop.call_soon_threadsafe(background.loop.stop)


def next_of(done: queue.SimpleQueue[Outcome]) -> Outcome | None:
    """The next outcome, or None if none comes within `LOOK_S` seconds."""
    try:
        return done.get(timeout=LOOK_S)
    except queue.Empty:
        return None


async def answer(
    endpoint: Endpoint, number: int, request: CompletionRequest, tenant: str, done: queue.SimpleQueue[Outcome]
) -> None:
    try:
        done.put((number, await endpoint.complete(request, tenant)))
    except asyncio.CancelledError:
        raise
    except BaseException as error:
        done.put((number, error))


async def connect(model: Model, concurrency: int, seconds: float) -> Endpoint:
    """The endpoint of a model. A coroutine, so that its client is created on the event loop that uses it."""
    url = (model.url or "").rstrip("/")
    headers = {"Accept-Encoding": ACCEPTED}
    if model.api_key_env is not None:
        key = secret(model.api_key_env)
        if not key:
            raise EngineError(f"Model {model.name!r} needs a key: set the environment variable {model.api_key_env}.")
        headers["Authorization"] = f"Bearer {key}"
    timeout = httpx.Timeout(seconds, connect=10.0, pool=None)
    limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency, keepalive_expiry=4.0)
    return Endpoint(model, url, httpx.AsyncClient(headers=headers, timeout=timeout, limits=limits))


def open_engine(model: Model, settings: Settings) -> HttpEngine:
    """The engine for a catalogue entry with a `url`. No request is sent yet.

    Raises:
        RequestError: The entry has no url, its url is not http:// or https://, or the url's port is no port.
    """
    if not (model.url or "").startswith(("http://", "https://")):
        raise RequestError(f"Model {model.name!r} has url {model.url!r}; it must be like http://localhost:8000/v1.")
    if not has_port(model.url or ""):
        raise RequestError(f"Model {model.name!r} has url {model.url!r}, which cannot be reached: {PORTS}.")
    return HttpEngine(model)
