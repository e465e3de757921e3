"""Engines that several test files ask."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator

from complete_fn import Completion, CompletionRequest, EchoEngine, Usage


class Extracting(EchoEngine):
    """Answers a schema with an object of it."""

    def complete(self, request: CompletionRequest) -> Completion:
        if request.response_format is None:
            return super().complete(request)
        names = json.loads(request.response_format)["properties"]
        return Completion(json.dumps(dict.fromkeys(names, "x")), "stop", usage=Usage(3, 0, 4))


class Counting(EchoEngine):
    """An EchoEngine that refuses what contains `bad` and remembers how many prompts each submission had."""

    def __init__(self) -> None:
        super().__init__()
        self.submissions: list[int] = []

    def stream(self, requests: Iterable[CompletionRequest], tenant: str) -> Iterator[tuple[int, Completion]]:
        self.submissions.append(0)
        for found in super().stream(requests, tenant):
            self.submissions[-1] += 1
            yield found

    def complete(self, request: CompletionRequest) -> Completion:
        if "bad" in str(request.prompt):
            return Completion.failed("blocked", "The content filter refused the row.")
        return super().complete(request)

    def asked(self) -> list[str]:
        return sorted(str(r.prompt) for r in self.requests)
