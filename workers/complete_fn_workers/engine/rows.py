"""Turns rows into vLLM requests, and vLLM outputs into answers: chat template, tokens, limits, sampling parameters."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from tokenizers import Tokenizer
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

from complete_fn_workers.engine.labels import LabelPlace, LabelSearch, label_tree
from complete_fn_workers.engine.wire import RowRefused

Prompt = str | list[list[str]]
Answer = list[Any]  # as in `wire`: text, finish_reason, code, message, scores, then tokens


@dataclass(slots=True)
class AnswerLimit:
    """The most tokens of an answer, and whether the caller has set this limit."""

    tokens: int
    of_caller: bool


class PromptReader:
    """Turns prompts into token ids, by the model's own chat template if it has one."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.fast = whole_text(getattr(tokenizer, "backend_tokenizer", None))
        self.has_template = bool(getattr(tokenizer, "chat_template", None))
        self.trees: dict[tuple[str, tuple[str, ...]], LabelPlace] = {}

    def token_ids(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt by the chat template, or without one, with the model's special tokens in front.

        Raises:
            RowRefused: The prompt has no messages, or the template or the tokenizer refuses it.
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
        except Exception as error:  # the template refuses the prompt, or the tokenizer cannot take the text
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

    def labels(self, choices: tuple[str, ...], prompt: Prompt) -> LabelPlace:
        """The labels' tokens as the model would write them behind the prompt, as a tree.

        Raises:
            RowRefused: The labels cannot be told apart by their tokens.
        """
        if self.has_template:
            before, gap = self.rendered("x"), ""
        else:  # a base model continues after a space, unless the prompt itself ends with white space
            text = prompt if isinstance(prompt, str) else prompt[-1][1]
            before, gap = "x", "" if text[-1:].isspace() else " "
        key = (gap, choices)
        if key not in self.trees:
            if len(self.trees) >= 64:
                self.trees.clear()
            tokens = [self.continuation(before, gap + label) for label in choices]
            self.trees[key] = label_tree(tokens, choices, self.tokenizer.eos_token_id)
        return self.trees[key]

    def continuation(self, before: str, text: str) -> list[int]:
        """Tokens of a text that follows another text; if the tokenizer would merge the two, those of the text alone."""
        head, whole = self.encode(before, special=False), self.encode(before + text, special=False)
        return whole[len(head) :] if whole[: len(head)] == head else self.encode(text, special=False)

    def count(self, texts: list[str]) -> list[int]:
        return [len(self.encode(text, special=False)) for text in texts]


def whole_text(backend: Any) -> Any:
    """A copy of a fast tokenizer that neither truncates nor pads, whatever tokenizer.json says; others unchanged."""
    if not isinstance(backend, Tokenizer):
        return backend
    copy = Tokenizer.from_str(backend.to_str())
    copy.encode_special_tokens = backend.encode_special_tokens  # the one setting that `to_str` leaves out
    copy.no_truncation()
    copy.no_padding()
    return copy


def answer_limit(prompt_tokens: int, context: int, wanted: int | None, default: int) -> AnswerLimit:
    """The most tokens that the answer may have.

    Raises:
        RowRefused: The prompt leaves no room within the context.
    """
    room = context - prompt_tokens
    if room < 1:
        raise RowRefused(
            "prompt_too_long",
            f"The prompt has {prompt_tokens} tokens; the model's context is {context} with the answer.",
            prompt_tokens,
        )
    if wanted is None:
        return AnswerLimit(min(room, default), False)
    return AnswerLimit(min(room, wanted), wanted <= room)


class Sampling:
    """The `options` of the wire as vLLM's parameters, which are made once per answer limit and shared by rows."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options
        self.max_tokens: int | None = options.get("max_tokens")
        self.priority: int = options.get("priority", 0)
        self.tell: bool = options.get("tell", False)
        self.choices = tuple(options.get("choices", ()))
        self.of_labels: dict[tuple[tuple[int, ...], ...], SamplingParams] = {}
        self.made: dict[int, SamplingParams] = {}

    def params(self, tokens: int) -> SamplingParams:
        found = self.made.get(tokens)
        if found is None:
            if len(self.made) > 1024:
                self.made.clear()
            found = self.made[tokens] = self.make(tokens)
        return found

    def scoring(self, place: LabelPlace) -> SamplingParams:
        """Parameters for one token, with the log-probability of each token that continues a label at this place."""
        key = place.path, tuple(place.ways)  # the labels' tokens depend on the prompt's end
        found = self.of_labels.get(key)
        if found is None:
            found = self.of_labels[key] = SamplingParams(
                temperature=0.0,
                max_tokens=1,
                logprob_token_ids=list(place.ways),
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
                skip_clone=True,
            )
        return found

    def make(self, tokens: int) -> SamplingParams:
        """The parameters for an answer limit. All fields are set: no default of vLLM or the checkpoint may apply."""
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
            # Only a streamed row pays for an output in every step.
            output_kind=RequestOutputKind.CUMULATIVE if self.tell else RequestOutputKind.FINAL_ONLY,
            skip_clone=True,  # rows of one kind share the object; vLLM copies it shallowly
        )


def grammar_schema(response_format: str) -> str:
    """The schema with llguidance's own settings.

    The grammar allows only one line as `json.dumps` writes it, because a small model can fill its answer with white
    space. A rule that the grammar cannot express is left to the check of the finished answer.
    """
    style = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": ", "lenient": True}
    return json.dumps({**json.loads(response_format), "x-guidance": style}, ensure_ascii=False)


@dataclass(slots=True)
class TextRequest:
    """A row that the engine answers with text, in one request."""

    ids: list[int]
    params: SamplingParams
    limit: AnswerLimit
    context: int

    @property
    def tokens(self) -> int:
        """The most tokens that the request may write."""
        return self.limit.tokens

    def take(self, output: Any) -> Answer | None:
        return answer_of(output, self.limit, self.context)


@dataclass(slots=True)
class LabelRequest:
    """A row that the engine answers with a label, in one request for each place of the tree that the search visits.

    Its usage is that of one request that writes a token at each place: the first request's prompt, and these tokens.
    """

    prompt_ids: list[int]
    sampling: Sampling
    search: LabelSearch
    deepest: int
    usage: list[int] = field(default_factory=list)

    @property
    def ids(self) -> list[int]:
        return [*self.prompt_ids, *self.search.place.path]

    @property
    def tokens(self) -> int:
        """The most tokens that the row can still need after `ids`: the path to the deepest place, and one token."""
        return self.deepest + 1 - len(self.search.place.path)

    @property
    def params(self) -> SamplingParams:
        return self.sampling.scoring(self.search.place)

    def take(self, output: Any) -> Answer | None:
        """The answer; None if the search needs another request."""
        outcome = output.outputs[0]
        if outcome.finish_reason not in ("stop", "length"):
            return refused_by_engine(outcome.finish_reason, output)
        if not outcome.logprobs:  # vLLM gives none in a step that checks tokens of speculative decoding
            why = "The engine gave no probabilities of the labels. Take speculative_config out of engine_args."
            return [None, None, "invalid_request", why, None, *tokens_of(output)]
        self.usage = self.usage or [len(self.prompt_ids), min(output.num_cached_tokens or 0, len(self.prompt_ids))]
        self.search.tell({token: found.logprob for token, found in outcome.logprobs[0].items()})
        label = self.search.answer
        if label is None:
            return None
        text = self.sampling.choices[label]
        return [text, "stop", None, None, self.search.scores, *self.usage, self.search.steps]


def request_of(
    prompts: PromptReader, prompt: Prompt, sampling: Sampling, context: int, default: int
) -> TextRequest | LabelRequest:
    """Turn a row into a request to the engine. `default`: the most tokens of an answer if the caller set no limit.

    Raises:
        RowRefused: The row cannot be sent to the engine.
    """
    ids = prompts.token_ids(prompt)
    if sampling.choices:
        tree = prompts.labels(sampling.choices, prompt)
        answer_limit(len(ids) + tree.depth, context, 1, 1)
        return LabelRequest(ids, sampling, LabelSearch(tree), tree.depth)
    limit = answer_limit(len(ids), context, sampling.max_tokens, default)
    return TextRequest(ids, sampling.params(limit.tokens), limit, context)


def refused_by_engine(reason: Any, output: Any) -> Answer:
    return [None, reason, "invalid_request", f"The engine ended the row with {reason!r}.", None, *tokens_of(output)]


def tokens_of(output: Any) -> list[int]:
    """[tokens of the prompt, cached tokens among them, tokens of the answer so far]."""
    return [len(output.prompt_token_ids), output.num_cached_tokens or 0, len(output.outputs[0].token_ids)]


def answer_of(output: Any, limit: AnswerLimit, context: int) -> Answer:
    """A finished vLLM output as the wire's answer."""
    outcome = output.outputs[0]
    usage = tokens_of(output)
    reason = outcome.finish_reason
    if reason == "length" and not limit.of_caller:
        return [outcome.text, reason, "truncated", cut_by(usage[0], usage[2], context), None, *usage]
    if reason not in ("stop", "length"):
        return refused_by_engine(reason, output)
    return [outcome.text, reason, None, None, None, *usage]


def cut_by(prompt_tokens: int, tokens: int, context: int) -> str:
    if prompt_tokens + tokens >= context:
        full = f"with {prompt_tokens} of the prompt, the context of {context} is full"
        return f"The answer was cut after {tokens} tokens: {full}."
    return f"The answer was cut after {tokens} tokens, the model's default_max_tokens. Set max_tokens to allow more."
