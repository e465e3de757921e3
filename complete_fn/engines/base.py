"""`Engine` is the protocol of engines. `EchoEngine` implements it without a model, for users' own tests."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator
from typing import Protocol

from complete_fn.engines.catalogue import Model
from complete_fn.settings import Settings
from complete_fn.types import Completion, CompletionRequest, Usage


class Engine(Protocol):
    """Turns requests into completions. Implementations are safe to call from several threads at once.

    An engine may have a text attribute `identity`: engines of one class and identity share stored answers. Without
    that attribute only the same object reuses its answers.
    """

    def stream(self, requests: Iterable[CompletionRequest], tenant: str) -> Iterator[tuple[int, Completion]]:
        """Yield (position of the request, its completion) as each request is done, in any order.

        The engine draws requests only as fast as it computes them (back-pressure), so the iterable may be endless. A
        request that fails yields a completion with an `error`; no exception is raised for one row. `tenant` salts the
        prefix cache. Requests in flight are aborted when the iterator is closed, or within a second after the
        iterable's attribute `abandoned` becomes true. An engine may call a request's `tell` with the completion's
        text piece by piece, each time with the tokens that the row has taken so far.

        Raises:
            EngineError: The engine cannot start, or it died and one restart failed.
        """
        ...

    def count_tokens(self, texts: list[str]) -> list[int]:
        """Tokens of each text by the model's own tokenizer, without chat template and special tokens."""
        ...

    def close(self) -> None:
        """Release the engine. A shared engine ends when its last user releases it."""
        ...


def prompt_text(request: CompletionRequest) -> str:
    """The prompt as one text: a string as it is, or the contents of the messages, one per line."""
    if isinstance(request.prompt, str):
        return request.prompt
    return "\n".join(m.content for m in request.prompt)


class EchoEngine:
    """Answers every prompt with the prompt's text. Each word counts, and is told, as one token.

    With `choices` the answer is the label that the prompt names most often, or the earliest of several. The engine
    remembers all requests, for tests. The catalogue's engine does not, because a service may ask it without end.
    """

    def __init__(self, context: int = 4096, row_seconds: float = 0.0, remembers: bool = True) -> None:
        self.remembers = remembers
        self.context = context
        self.row_seconds = row_seconds
        self.requests: list[CompletionRequest] = []
        self.identity = f"context {context}"  # engines with the same context give the same answers

    def stream(self, requests: Iterable[CompletionRequest], tenant: str) -> Iterator[tuple[int, Completion]]:
        for position, request in enumerate(requests):
            if self.remembers:
                self.requests.append(request)
            time.sleep(self.row_seconds)
            completion = self.complete(request)
            if request.tell is not None:
                prompt = completion.usage.prompt_tokens
                for told, piece in enumerate(re.findall(r"\S+\s*", completion.text or ""), 1):
                    request.tell(piece, Usage(prompt, 0, told))
            yield position, completion

    def complete(self, request: CompletionRequest) -> Completion:
        words = prompt_text(request).split()
        if len(words) >= self.context:
            return Completion.failed(
                "prompt_too_long", f"The prompt has {len(words)} tokens; the model's context is {self.context}."
            )
        if request.choices:
            return self.choose(prompt_text(request), len(words), request.choices)
        answer = words if request.sampling.max_tokens is None else words[: request.sampling.max_tokens]
        return Completion(
            text=" ".join(answer),
            finish_reason="stop" if len(answer) == len(words) else "length",
            usage=Usage(prompt_tokens=len(words), completion_tokens=len(answer)),
        )

    def choose(self, prompt: str, tokens: int, choices: tuple[str, ...]) -> Completion:
        named = {c: len(re.findall(rf"(?<!\w){re.escape(c)}(?!\w)", prompt, re.IGNORECASE)) for c in choices}
        total = sum(named.values())
        scores = {c: n / total if total else 1 / len(choices) for c, n in named.items()}
        usage = Usage(prompt_tokens=tokens, completion_tokens=1)
        return Completion(max(choices, key=lambda c: scores[c]), "stop", usage=usage, scores=scores)

    def count_tokens(self, texts: list[str]) -> list[int]:
        return [len(text.split()) for text in texts]

    def close(self) -> None:
        self.requests.clear()


def open_engine(model: Model, settings: Settings) -> EchoEngine:
    return EchoEngine(model.max_model_len or 4096, float(model.engine_args.get("row_seconds", 0.0)), remembers=False)


def close(stream: Iterable[object]) -> None:
    if isinstance(stream, Iterator) and hasattr(stream, "close"):
        stream.close()
