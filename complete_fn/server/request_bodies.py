"""Bodies of the OpenAI routes, with OpenAI's defaults. A field that changes the answer is supported or refused."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError, core_schema

from complete_fn.engines.call import Call
from complete_fn.engines.catalogue import Model
from complete_fn.errors import RequestError
from complete_fn.prompts.options import parse_options
from complete_fn.prompts.schema_rules import refuse_patterns
from complete_fn.prompts.templates import escape, pack_messages
from complete_fn.registry import Table
from complete_fn.types import INTERACTIVE

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
DEFAULT_LIMIT = "Without max_tokens, end answers at the model's default_max_tokens, as rows of jobs do."
Zero = Annotated[float, Field(ge=0, le=0)]


class TableName:
    """Annotates a string that names an entry of a table. It is refused and documented like a Literal of the names."""

    def __init__(self, table: Table[Any]) -> None:
        self.table = table

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> core_schema.CoreSchema:
        return core_schema.no_info_after_validator_function(self.checked, core_schema.str_schema())

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> dict[str, Any]:
        return {"type": "string", "enum": [*self.table]}

    def checked(self, name: str) -> str:
        if name not in self.table:
            *first, last = map(repr, self.table)
            expected = f"{', '.join(first)} or {last}" if first else last
            raise PydanticCustomError("literal_error", "Input should be {expected}", {"expected": expected})
        return name


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class TextPart(Body):
    type: Literal["text"]
    text: str


class ChatMessage(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: bool = False


class SamplingBody(Body):
    """The fields that chat completions and completions share. `user`, `metadata` and the like are ignored."""

    model: str
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    n: Literal[1] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    presence_penalty: Zero | None = None
    frequency_penalty: Zero | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def priority(self) -> int:
        """Requests overtake bulk work, except those of the tier that OpenAI calls `flex`, which may wait."""
        return 0 if self.service_tier == "flex" else INTERACTIVE

    def call(self, model: Model, max_tokens: int | None, response_format: Any = None, usual: bool = False) -> Call:
        """The call with OpenAI's defaults, temperature 1 and top_p 1.

        Without `max_tokens` an answer may fill the context, or if `usual` has the model's default limit.
        """
        given = {
            "temperature": 1.0 if self.temperature is None else self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "seed": self.seed,
            "stop": self.stop or None,
            "max_tokens": max_tokens or (None if usual else model.max_model_len),
            "response_format": response_format,
        }
        options = parse_options(given)
        refuse_patterns(options.response_format)
        return Call.of(model, options)


class ChatBody(SamplingBody):
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "model": "demo-llama-swiftkv",
                    "messages": [{"role": "user", "content": "Name the section: a text editor"}],
                }
            ]
        },
    )
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    default_max_tokens: Annotated[bool, Field(description=DEFAULT_LIMIT)] = False
    response_format: dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None

    def prompt(self) -> str:
        return pack_messages([{"role": ROLES[m.role], "content": content(m)} for m in self.messages])

    def chat_call(self, model: Model) -> Call:
        limit = self.max_completion_tokens or self.max_tokens
        return self.call(model, limit, schema_of(self.response_format), self.default_max_tokens)


class CompletionBody(SamplingBody):
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"model": "demo-llama-swiftkv", "prompt": "Name the section: vim", "max_tokens": 16}]
        }
    )
    prompt: str | Annotated[list[str], Field(min_length=1, max_length=2048)]
    max_tokens: Annotated[int, Field(ge=1)] | None = 16
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None

    def texts(self) -> list[str]:
        """The prompts as planned texts, which `run` takes."""
        return [escape(text) for text in ([self.prompt] if isinstance(self.prompt, str) else self.prompt)]

    def completion_call(self, model: Model) -> Call:
        return self.call(model, self.max_tokens)


def content(message: ChatMessage) -> str:
    if isinstance(message.content, str):
        return message.content
    return "".join(part.text for part in message.content)


def schema_of(given: dict[str, Any] | None) -> Any:
    """OpenAI's response_format in the form that `parse_options` takes."""
    kind = (given or {}).get("type")
    if given is None or kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    if kind == "json_schema":
        return given
    raise RequestError(f"response_format.type = {kind!r} is not one of 'text', 'json_object', 'json_schema'.")
