"""Engines that several test files ask."""

from __future__ import annotations

import json

from complete_fn import Completion, CompletionRequest, EchoEngine, Usage


class Extracting(EchoEngine):
    """Answers a schema with an object of it."""

    def complete(self, request: CompletionRequest) -> Completion:
        if request.response_format is None:
            return super().complete(request)
        names = json.loads(request.response_format)["properties"]
        return Completion(json.dumps(dict.fromkeys(names, "x")), "stop", usage=Usage(3, 0, 4))
