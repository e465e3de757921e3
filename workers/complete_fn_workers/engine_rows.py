"""Rows to vLLM requests and vLLM outputs to answers: chat template, tokens, limits, sampling parameters."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

Prompt = str | list[list[str]]
Answer = list[Any]  # as in engine_wire: text, finish_reason, code, message, prompt, cached and completion tokens


class RowRefused(Exception):
    """The row cannot be sent to the engine; `code` is a key of `ROW_ERRORS`."""

    def __init__(self, code: str, message: str, prompt_tokens: int = 0) -> None:
        super().__init__(message)
        self.code = code
        self.prompt_tokens = prompt_tokens

    @property
    def answer(self) -> Answer:
        return [None, None, self.code, str(self), 0, 0, 0]


@dataclass(slots=True)
class Limit:
    """How many tokens the answer may have, and whether the caller said so."""

    tokens: int
    of_caller: bool


class PromptReader:
    """Prompts to token ids, by the model's own chat template where it has one."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.fast = getattr(tokenizer, "backend_tokenizer", None)
        self.has_template = bool(getattr(tokenizer, "chat_template", None))

    def token_ids(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt: template applied, else with the model's own special tokens in front.

        Raises:
            RowRefused: no messages, or the template or the tokenizer refuses the prompt.
        """
        if not isinstance(prompt, str) and not prompt:
            raise RowRefused("invalid_request", "The prompt has no messages.")
        try:
            if not self.has_template:
                text = prompt if isinstance(prompt, str) else "\n\n".join(content for _, content in prompt)
                return self.encode(text, special=True) or [self.first_token()]
            return self.encode(self.rendered(prompt), special=False)
        except RowRefused:
            raise
        except Exception as error:  # a template's own complaint, or a text that the tokenizer cannot take
            raise RowRefused("invalid_request", f"The prompt cannot be rendered: {error}") from error

    def rendered(self, prompt: Prompt) -> str:
        turns = [["user", prompt]] if isinstance(prompt, str) else prompt
        messages = [{"role": role, "content": content} for role, content in turns]
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def encode(self, text: str, special: bool) -> list[int]:
        if self.fast is not None:
            return list(self.fast.encode(text, add_special_tokens=special).ids)
        return list(self.tokenizer.encode(text, add_special_tokens=special))

    def first_token(self) -> int:
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        raise RowRefused("invalid_request", "The prompt is empty and the model has no token to begin with.")

    def count(self, texts: list[str]) -> list[int]:
        return [len(self.encode(text, special=False)) for text in texts]


def answer_limit(prompt_tokens: int, context: int, wanted: int | None, default: int) -> Limit:
    """Tokens that the answer may have.

    Raises:
        RowRefused: the prompt leaves no room within the context.
    """
    room = context - prompt_tokens
    if room < 1:
        raise RowRefused(
            "prompt_too_long",
            f"The prompt has {prompt_tokens} tokens; the model's context is {context} with the answer.",
            prompt_tokens,
        )
    if wanted is None:
        return Limit(min(room, default), False)
    return Limit(min(room, wanted), wanted <= room)


class Sampling:
    """One `options` of the wire as vLLM's parameters; made once per answer limit, shared by the rows."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options
        self.max_tokens: int | None = options.get("max_tokens")
        self.made: dict[int, SamplingParams] = {}

    def params(self, tokens: int) -> SamplingParams:
        found = self.made.get(tokens)
        if found is None:
            if len(self.made) > 1024:
                self.made.clear()
            found = self.made[tokens] = self.make(tokens)
        return found

    def make(self, tokens: int) -> SamplingParams:
        """Every field that could come from elsewhere is set here, so no default of vLLM or the checkpoint leaks in."""
        options = self.options
        schema = options.get("response_format")
        return SamplingParams(
            n=1,
            temperature=options.get("temperature", 0.0),
            top_p=options.get("top_p", 1.0),
            top_k=options.get("top_k", 0),
            min_p=0.0,
            presence_penalty=0.0,
            frequency_penalty=0.0,
            repetition_penalty=1.0,
            seed=options.get("seed"),
            stop=list(options.get("stop", ())) or None,
            max_tokens=tokens,
            min_tokens=0,
            structured_outputs=None if schema is None else StructuredOutputsParams(json=grammar_schema(schema)),
            output_kind=RequestOutputKind.FINAL_ONLY,
            skip_clone=True,  # rows of one kind share the object; vLLM copies it shallowly
        )


def grammar_schema(response_format: str) -> str:
    """The schema with llguidance's own settings: one line as `json.dumps` writes it, for a small model can fill its
    answer with white space; what the grammar cannot express is left to the check of the finished answer."""
    style = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": ", "lenient": True}
    return json.dumps({**json.loads(response_format), "x-guidance": style}, ensure_ascii=False)


def answer_of(output: Any, limit: Limit, context: int) -> Answer:
    """A finished vLLM output as the wire's answer."""
    outcome = output.outputs[0]
    prompt_tokens = len(output.prompt_token_ids)
    tokens = len(outcome.token_ids)
    usage = [prompt_tokens, output.num_cached_tokens or 0, tokens]
    reason = outcome.finish_reason
    if reason == "length" and not limit.of_caller:
        return [outcome.text, reason, "truncated", cut_by(prompt_tokens, tokens, context), *usage]
    if reason not in ("stop", "length"):
        return [None, reason, "invalid_request", f"The engine ended the row with {reason!r}.", *usage]
    return [outcome.text, reason, None, None, *usage]


def cut_by(prompt_tokens: int, tokens: int, context: int) -> str:
    if prompt_tokens + tokens >= context:
        full = f"with {prompt_tokens} of the prompt, the context of {context} is full"
        return f"The answer was cut after {tokens} tokens: {full}."
    return f"The answer was cut after {tokens} tokens, the model's default_max_tokens. Set max_tokens to allow more."
