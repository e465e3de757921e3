"""Give any table a COMPLETE(model, prompt) function. The public names; each is loaded on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from complete_fn.client import Client
    from complete_fn.engines.base import EchoEngine, Engine
    from complete_fn.errors import CompleteError
    from complete_fn.session import CompletionWarning, Session
    from complete_fn.types import Completion, CompletionRequest, SamplingParams, Usage

__version__ = "0.1.0"

HOMES = {
    "Client": "client",
    "CompleteError": "errors",
    "Completion": "types",
    "CompletionRequest": "types",
    "CompletionWarning": "session",
    "EchoEngine": "engines.base",
    "Engine": "engines.base",
    "SamplingParams": "types",
    "Session": "session",
    "Usage": "types",
}

__all__ = [
    "Client",
    "CompleteError",
    "Completion",
    "CompletionRequest",
    "CompletionWarning",
    "EchoEngine",
    "Engine",
    "SamplingParams",
    "Session",
    "Usage",
]


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module 'complete_fn' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"complete_fn.{HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
