"""One chat completion over HTTP: this module builds the request, waits for a busy endpoint and reads the reply."""

from __future__ import annotations

import asyncio
import email.utils
import json
import math
import random
import re
import time
import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import httpx

from complete_fn.engines.catalogue import Model
from complete_fn.engines.structured_output import choice_schema
from complete_fn.errors import EngineBusyError, EngineError, RequestError
from complete_fn.text import is_utf8
from complete_fn.tokens import BYTES_PER_TOKEN
from complete_fn.types import Completion, CompletionRequest, RowError, Usage

BUSY = (429, 503)  # statuses by which the endpoint says that it did no work
BROKEN = (502, 504)  # statuses of a gateway: the endpoint behind it may have done the work
WHOLE = ("stop", "eos", "eos_token", "stop_sequence", "end_turn")  # finish reasons, in lower case
CUT = ("length", "model_length", "max_tokens")
WAIT_S, FIRST_WAIT_S = 120.0, 1.0
MOST_BROKEN = 5  # connections that break one after the other, without a reply in between, until the run ends
CONNECT_PAUSES_S = (0.5, 1.0, 2.0, 4.0)  # between tries to connect to an endpoint that has answered before
# Bytes that a reply may have. A token is a few bytes of text, escaped up to 12 each; with `logprobs` in extra_body it
# is up to 2 KB.
REPLY_BYTES, BYTES_OF_ANSWER_TOKEN, MOST_REPLY_BYTES = 1 << 20, 2048, 32 << 20
REFUSAL_BYTES = 1 << 16  # of a reply with another status than 200; the rest is not read
SPREAD_S = 1.0  # rows that wait for one moment wake up spread over this long after it, or over the pause if shorter
ACCEPTED = "gzip, deflate"  # what can be decompressed within bounds
FRAMING = ("content-encoding", "content-length", "transfer-encoding")  # headers that no longer hold for a read body
TOO_LONG = re.compile(
    r"context.{0,12}(length|window|size)|maximum (context|input|prompt)|max_model_len|too (long|many tokens)"
    r"|input length|longer than the (maximum )?model|max_(completion_)?tokens.{0,30}too large",
    re.IGNORECASE,
)


class OverlongReply(Exception):
    """The endpoint's reply has more bytes than the request can need."""


UNREADABLE = (httpx.HTTPError, EngineError, OverlongReply, ValueError, KeyError, TypeError)  # of a list of models


class Endpoint:
    """The endpoint of one model.

    Attributes:
        quiet_until: the time before which a busy endpoint must not be asked, by any row.
        pause: seconds from the busy reply to `quiet_until`.
        served_at: the time of the last reply, to any row, that was not busy.
        broken: connections that broke since the last reply.
        ours: whether the endpoint is a complete-fn service; None until it was asked.
    """

    def __init__(self, model: Model, url: str, client: httpx.AsyncClient) -> None:
        self.model = model
        self.url = url
        self.client = client
        self.quiet_until = self.pause = self.served_at = 0.0
        self.broken = 0
        self.asked = asyncio.Lock()
        self.ours: bool | None = None

    @property
    def served_name(self) -> str:
        given = self.model.engine_args.get("served_name")
        by_name = self.ours or self.model.local_folder is not None
        return str(given or (self.model.name if by_name else self.model.checkpoint))

    async def learn(self) -> None:
        """Ask once whether the endpoint is a complete-fn service, which names models as the catalogue does."""
        async with self.asked:
            if self.ours is None:
                try:
                    entries = await self.models()
                    self.ours = any(m["owned_by"] == "complete-fn" and m["id"] == self.model.name for m in entries)
                except UNREADABLE:
                    self.ours = False

    async def models(self) -> Any:
        """The endpoint's list of models. Raises one of `UNREADABLE` if there is none."""
        reply = await self.fetch("GET", self.url + "/models", MOST_REPLY_BYTES, timeout=httpx.Timeout(10.0))
        return read_json(reply)["data"]

    async def complete(self, request: CompletionRequest, tenant: str) -> Completion:
        """The completion, or the row's error.

        Raises:
            EngineError: Every row fails: no server answers at the URL, or it refuses the key or the model.
            EngineBusyError: The endpoint stays busy for longer than this engine waits.
        """
        await self.learn()
        body = self.body(request, tenant)
        if not is_utf8(json.dumps(body, ensure_ascii=False)):
            return Completion.failed("invalid_request", "The prompt has a lone surrogate and cannot be encoded.")
        if not body["messages"]:
            return Completion.failed("invalid_request", "The prompt has no messages.")
        try:
            reply = await self.ask(body)
            if reply.status_code == 400 and too_long(reply):
                # Prompt and max_tokens together may exceed the context: let the endpoint bound the answer instead.
                body.pop(self.max_tokens_field, None)
                return await self.outcome(await self.ask(body), request, limited=False)
            return await self.outcome(reply, request, limited=request.sampling.max_tokens is not None)
        except OverlongReply as error:  # the endpoint has computed it, and may bill all that it was asked for
            room = request.sampling.max_tokens or self.model.default_max_tokens
            cut = RowError("truncated", str(error))
            return Completion(None, "length", cut, replace(guessed(request, "", room), completion_tokens=room))
        except httpx.TimeoutException:
            return Completion.failed("timeout", f"{self.url} did not answer within {self.client.timeout.read:g} s.")
        except httpx.TransportError as error:  # the row may have been paid for, so only the caller may send it again
            return Completion.failed("timeout", f"{self.url} broke the connection ({type(error).__name__}).")

    @property
    def max_tokens_field(self) -> str:
        return str(self.model.engine_args.get("max_tokens_field", "max_tokens"))

    def body(self, request: CompletionRequest, tenant: str) -> dict[str, Any]:
        prompt, sampling = request.prompt, request.sampling
        turns = [("user", prompt)] if isinstance(prompt, str) else [(m.role, m.content) for m in prompt]
        body: dict[str, Any] = {
            "model": self.served_name,
            "messages": [{"role": role, "content": content} for role, content in turns],
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            self.max_tokens_field: sampling.max_tokens or self.model.default_max_tokens,
        }
        if self.ours and sampling.max_tokens is None:
            del body[self.max_tokens_field]
            body["default_max_tokens"] = True  # gives the same key as in a job there, so that the answer is paid once
        if sampling.top_k:
            body["top_k"] = sampling.top_k
        if sampling.seed is not None:
            body["seed"] = sampling.seed
        if sampling.stop:
            body["stop"] = list(sampling.stop)
        if request.response_format is not None:
            schema = {"name": "answer", "schema": json.loads(request.response_format), "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        if self.ours and request.priority >= 0:
            body["service_tier"] = "flex"  # rows of a table need not overtake the service's jobs
        if request.choices:
            body |= self.one_of(request.choices)
        if self.model.engine_args.get("cache_salt") and tenant:
            body["cache_salt"] = tenant
        return body | dict(self.model.engine_args.get("extra_body", {}))

    def one_of(self, choices: tuple[str, ...]) -> dict[str, Any]:
        """The body's fields that restrict an answer to the labels.

        Raises:
            RequestError: engine_args.choices has a value that this engine does not know.
        """
        how = self.model.engine_args.get("choices", "json_schema")
        if how == "structured_outputs":
            return {"structured_outputs": {"choice": list(choices)}}
        if how != "json_schema":
            raise RequestError(f"engine_args.choices is {how!r}; it must be 'json_schema' or 'structured_outputs'.")
        schema = {"name": "answer", "schema": choice_schema(choices), "strict": True}
        return {"response_format": {"type": "json_schema", "json_schema": schema}}

    async def ask(self, body: dict[str, Any]) -> httpx.Response:
        """The reply, after the waits that a busy endpoint asks for. Without a Retry-After each wait doubles.

        Raises:
            EngineBusyError: By the end of the next wait the endpoint has served no row for `WAIT_S` seconds.
        """
        began = time.monotonic()
        while True:
            await self.quiet()
            reply = await self.post("/chat/completions", body)
            now = time.monotonic()
            if reply.status_code not in BUSY:
                self.served_at = now
                return reply
            idle = now - max(began, self.served_at)
            pause = retry_after(reply) or max(FIRST_WAIT_S, min(idle, WAIT_S - idle))
            if idle + pause > WAIT_S:
                raise EngineBusyError(
                    f"{self.url} stays busy ({reply.status_code}) since {idle:.0f} s: "
                    f"{self.without_key(complaint(reply))} "
                    "Try later, or lower engine_args.concurrency."
                )
            self.quiet_until, self.pause = max(self.quiet_until, now + pause), pause

    async def quiet(self) -> None:
        """Wait until the endpoint may be asked. Another row's reply may extend the wait meanwhile."""
        while (left := self.quiet_until - time.monotonic()) > 0:
            await asyncio.sleep(left + random.uniform(0, min(self.pause, SPREAD_S)))

    async def post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        """The reply. A request is sent again only if no connection could be made, so that it cannot have arrived.

        Raises:
            httpx.TransportError: The endpoint may have got the request, and did not reply.
            EngineError: No server answers at the URL, or `MOST_BROKEN` connections broke one after the other.
        """
        pauses = iter(CONNECT_PAUSES_S if self.served_at else ())
        tokens = body.get(self.max_tokens_field) or self.model.max_model_len
        most = min(REPLY_BYTES + tokens * BYTES_OF_ANSWER_TOKEN, MOST_REPLY_BYTES) if tokens else MOST_REPLY_BYTES
        while True:
            try:
                reply = await self.fetch("POST", self.url + path, most, body)
                self.broken = 0
                return reply
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                pause = next(pauses, None)
                if pause is None:
                    raise EngineError(
                        f"Nobody answers at {self.url} ({error}). Start the endpoint, for example with `vllm serve` or "
                        f"`ollama serve`, or set the url of model {self.model.name!r}."
                    ) from error
                await asyncio.sleep(pause)
            except httpx.TimeoutException:
                raise
            except OverlongReply:
                self.broken = 0
                raise
            except httpx.TransportError as error:
                self.broken += 1
                if self.broken >= MOST_BROKEN:
                    raise EngineError(
                        f"{self.url} broke {self.broken} connections one after the other "
                        f"({type(error).__name__}: {error or 'no reason given'})."
                    ) from error
                raise

    async def fetch(
        self, method: str, url: str, most: int, body: dict[str, Any] | None = None, timeout: httpx.Timeout | None = None
    ) -> httpx.Response:
        """A reply of at most so many bytes, after decompression. A refusal with more is cut.

        Raises:
            httpx.TimeoutException: The reply did not begin, or did not end, within the timeout's seconds for a read.
            OverlongReply: The reply has status 200 and more bytes.
        """
        timeout = timeout or self.client.timeout
        async with self.client.stream(method, url, json=body, timeout=timeout) as reply:
            try:
                async with asyncio.timeout(timeout.read):  # httpx has only a time limit for each piece
                    content = await read_bounded(reply, most if reply.status_code == 200 else REFUSAL_BYTES)
            except TimeoutError as error:
                raise httpx.ReadTimeout("The reply did not end.") from error
        kept = [(name, value) for name, value in reply.headers.multi_items() if name not in FRAMING]
        return httpx.Response(reply.status_code, headers=kept, content=content, request=reply.request)

    async def outcome(self, reply: httpx.Response, request: CompletionRequest, limited: bool) -> Completion:
        """The completion that a reply means; `limited`: whether the caller's max_tokens bounds the answer."""
        status, why = reply.status_code, self.without_key(complaint(reply))
        if status == 200 and not failed(reply):
            room = request.sampling.max_tokens or self.model.default_max_tokens
            return completion(reply, request, room, limited)
        if status in (401, 403):
            source = f"the environment variable {self.model.api_key_env}" if self.model.api_key_env else "api_key_env"
            raise EngineError(f"{self.url} refuses the key ({status}): {why} Check {source}.")
        if status == 404:
            raise EngineError(f"{self.url} does not serve {self.served_name!r} (404): {why} {await self.served()}")
        if 300 <= status < 400:
            raise EngineError(f"{self.url} points elsewhere ({status}); set the url to where it really is.")
        if status in BROKEN:  # the row may have been paid for, so only the caller may send it again
            return Completion.failed("timeout", f"A gateway gave up on the row ({status}): {why}")
        if status == 413 or too_long(reply):
            return Completion.failed("prompt_too_long", why)
        if "content_filter" in reply.text or "content_policy" in reply.text:
            return Completion.failed("blocked", why)
        return Completion.failed("invalid_request", f"The endpoint refuses the row ({status}): {why}")

    def without_key(self, text: str) -> str:
        """The text without the API key, which some endpoints quote in their refusals."""
        key = self.client.headers.get("authorization", "").removeprefix("Bearer ")
        return text.replace(key, "***") if key else text

    async def served(self) -> str:
        try:
            names = [m["id"] for m in await self.models()]
        except UNREADABLE:
            return "Check the url: it ends with /v1."
        return f"It serves {', '.join(map(repr, names)) or 'no model'}; set engine_args.served_name."

    async def count_tokens(self, texts: list[str]) -> list[int]:
        root = self.url.removesuffix("/v1")
        counts = []
        for text in texts:
            body = {"model": self.served_name, "prompt": text, "add_special_tokens": False}
            most = REPLY_BYTES + 16 * len(text.encode())  # the reply lists the tokens too
            try:
                reply = await self.fetch("POST", f"{root}/tokenize", most, body)
            except OverlongReply as error:
                raise EngineError(f"{root}/tokenize: {error}") from error
            if reply.status_code != 200:
                raise EngineError(f"{root} has no /tokenize ({reply.status_code}); tokens cannot be counted there.")
            counts.append(int(read_json(reply)["count"]))
        return counts

    async def close(self) -> None:
        await self.client.aclose()


async def read_bounded(reply: httpx.Response, most: int) -> bytes:
    """The reply's body. It is decompressed piece by piece, so that a small body cannot become a large one in memory.

    Raises:
        OverlongReply: The body of a reply with status 200 has more bytes than `most`; a refusal's is cut there.
        EngineError: The endpoint compresses its reply in a way that it was not asked for.
    """
    decode, content = decoder(reply), bytearray()
    async for piece in reply.aiter_raw():
        try:
            content += decode(piece, most + 1 - len(content))
        except zlib.error as error:
            raise EngineError(f"{reply.url} sends a reply that cannot be decompressed ({error}).") from error
        if len(content) > most:
            if reply.status_code == 200:
                raise OverlongReply(f"The endpoint's reply has more than {most:,} bytes; it was not read to its end.")
            return bytes(content[:most])
    return bytes(content)


def decoder(reply: httpx.Response) -> Callable[[bytes, int], bytes]:
    """Turns a piece of the body into at most so many bytes of content; what follows these is dropped."""
    encoding = reply.headers.get("content-encoding", "identity").strip().lower()
    if encoding in ("identity", ""):
        return lambda piece, most: piece[:most]
    if encoding in ("gzip", "x-gzip"):
        return zlib.decompressobj(16 + zlib.MAX_WBITS).decompress
    if encoding == "deflate":
        return zlib.decompressobj().decompress
    raise EngineError(f"{reply.url} compresses its reply with {encoding!r}, although {ACCEPTED!r} was asked for.")


def read_json(reply: httpx.Response) -> Any:
    """Raises:
    ValueError: The body is not JSON, or is nested too deeply.
    """
    try:
        return reply.json()
    except RecursionError as error:
        raise ValueError("The reply is nested too deeply.") from error


def completion(reply: httpx.Response, request: CompletionRequest, room: int, limited: bool) -> Completion:
    """The answer of a reply with status 200.

    An answer that may not be whole gets an error, because an answer without one is stored for all callers.

    Args:
        room: the tokens that the answer may have, and that a cap has reserved.
        limited: whether `room` is the caller's max_tokens, so that an answer cut there is whole.
    """
    try:
        found = read_json(reply)
        choice, usage = found["choices"][0], found.get("usage")
        text, refusal = text_of(choice["message"].get("content")), choice["message"].get("refusal")
        reason = choice.get("finish_reason")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise EngineError(f"{reply.url} is no OpenAI-compatible endpoint; it says: {reply.text[:200]}") from error
    used = reported(usage) or guessed(request, text, room)
    ended = str(reason or "stop").lower()
    if ended == "content_filter":
        return Completion(None, reason, RowError("blocked", "The endpoint's content filter stopped the answer."), used)
    if refusal and not text:
        return Completion(None, reason, RowError("blocked", f"The model refuses: {refusal}"[:500]), used)
    if ended in CUT:
        if limited and used.completion_tokens >= room:
            return Completion(text, "length", None, used)
        why = f"The answer was cut after {used.completion_tokens} tokens by a limit that was not asked for."
        return Completion(text, "length", RowError("truncated", why), used)
    if ended not in WHOLE:
        why = f"The endpoint ended the answer with finish_reason {reason!r}; it may not be whole. Ask the row again."
        return Completion(text, str(reason), RowError("invalid_request", why), used)
    return Completion(text, reason, None, used)


def failed(reply: httpx.Response) -> bool:
    """Whether the reply's body is an error: some gateways pass on a row's failure with status 200."""
    try:
        return bool(read_json(reply).get("error"))
    except (ValueError, AttributeError):
        return False


def text_of(content: Any) -> str:
    """The text of a message's content, which is a text or a list of parts.

    Raises:
        TypeError: The content is neither a text nor a list of parts.
    """
    if isinstance(content, list):
        return "".join(part.get("text") or "" for part in content if part.get("type") == "text")
    if content is not None and not isinstance(content, str):
        raise TypeError(f"content is {content!r}")
    return content or ""


def reported(usage: Any) -> Usage | None:
    """The usage that the endpoint reports; None if it reports none or an unreadable one."""
    try:
        details = usage.get("prompt_tokens_details") or {}
        prompt = max(0, int(usage.get("prompt_tokens") or 0))
        cached = max(0, int(details.get("cached_tokens") or 0))
        completion = max(0, int(usage.get("completion_tokens") or 0))
    except (AttributeError, TypeError, ValueError, OverflowError):
        return None
    return Usage(prompt, min(cached, prompt), completion) if usage else None


def guessed(request: CompletionRequest, answer: str, room: int) -> Usage:
    """The usage by bytes, for endpoints that report none: otherwise the row would cost nothing."""
    prompt = request.prompt
    asked = prompt if isinstance(prompt, str) else "".join(m.content for m in prompt)
    return Usage(
        prompt_tokens=math.ceil(len(asked.encode()) / BYTES_PER_TOKEN),
        completion_tokens=min(room, math.ceil(len(answer.encode("utf-8", "replace")) / BYTES_PER_TOKEN)),
    )


def too_long(reply: httpx.Response) -> bool:
    return "context_length_exceeded" in reply.text or bool(TOO_LONG.search(complaint(reply)))


def complaint(reply: httpx.Response) -> str:
    """The endpoint's error message, cut to 500 characters."""
    try:
        found = read_json(reply)
        error = found.get("error", found)
        message = error.get("message") if isinstance(error, dict) else error
        text = str(message or found.get("detail") or reply.text)
    except (ValueError, AttributeError):
        text = reply.text
    return text.strip()[:500]


def retry_after(reply: httpx.Response) -> float | None:
    """Seconds that the Retry-After header asks for, as a number or a date (RFC 9110, 10.2.3); None without one."""
    value = reply.headers.get("retry-after")
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None
