"""The nouns: what is asked, what comes back, what it used. All frozen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

Source = Literal["computed", "duplicate", "cache"]
# service: billed there, not by this ledger; unknown: nobody has said what the tokens cost, so they count 0
PriceBasis = Literal["example", "yours", "metered", "service", "unknown"]


@dataclass(frozen=True, slots=True)
class Message:
    """One chat message; `role` is `system`, `user` or `assistant`."""

    role: str
    content: str


Prompt = str | tuple[Message, ...]
INTERACTIVE = -1


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to sample, named as in vLLM. `max_tokens` None: what the context leaves, capped by the catalogue."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


@dataclass(frozen=True, slots=True)
class CompletionRequest:
    """One prompt for one model. `response_format` is a JSON schema as canonical JSON text; `choices` are labels, the
    likeliest of which is the answer.

    How the answer comes changes nothing in it: `priority` as in vLLM, lower first, `INTERACTIVE` where somebody
    waits; `tell` is called with each new piece of the text and the usage up to it, on a thread of the engine's, by
    engines that can.
    """

    model: str
    prompt: Prompt
    sampling: SamplingParams = field(default_factory=SamplingParams)
    response_format: str | None = None
    priority: int = field(default=0, compare=False)
    tell: Callable[[str, Usage], None] | None = field(default=None, compare=False, repr=False)
    choices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one row: `cached_tokens` of the `prompt_tokens` came from the prefix cache.

    `device_seconds` is the row's share of the engine's time, `prompt_seconds` of it for the prompt; 0 where the engine
    does not meter it.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    device_seconds: float = field(default=0.0, compare=False)
    prompt_seconds: float = field(default=0.0, compare=False)

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.prompt_tokens + other.prompt_tokens,
            self.cached_tokens + other.cached_tokens,
            self.completion_tokens + other.completion_tokens,
            self.device_seconds + other.device_seconds,
            self.prompt_seconds + other.prompt_seconds,
        )


@dataclass(frozen=True, slots=True)
class RowError:
    """Why one row has no answer; `code` is a key of `errors.ROW_ERRORS`."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Completion:
    """The outcome of one request: `text` or `error`. A text cut by an unset limit is kept beside `truncated`.

    `scores`: each label's probability among the labels; None for one of which only is known that another is likelier.
    """

    text: str | None
    finish_reason: str | None = None
    error: RowError | None = None
    usage: Usage = Usage()
    source: Source = "computed"
    scores: Mapping[str, float | None] | None = None

    @classmethod
    def failed(cls, code: str, message: str, usage: Usage = Usage()) -> Completion:
        return cls(None, error=RowError(code, message), usage=usage)


@dataclass(frozen=True, slots=True)
class Asker:
    """On whose behalf a run is made. `job` names work that can be resumed; `query_tag` marks its ledger lines.

    `claim`: (id, name of the claim) of the job's part that is run.
    """

    tenant: str = "local"
    user: str = "local"
    job: str | None = None
    query_tag: str | None = None
    claim: tuple[int, str] | None = None
