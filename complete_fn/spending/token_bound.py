"""`PromptBound` bounds the tokens of a row's prompt, so that a budget is never passed."""

from __future__ import annotations

from functools import cached_property

from complete_fn.engines.catalogue import Model
from complete_fn.engines.tokenizer import template_tokens
from complete_fn.prompts.templates import unpack
from complete_fn.text import encode_text
from complete_fn.types import Usage


class PromptBound:
    """The most tokens that a row's prompt can have: its bytes, as a token has at least one, plus the chat template's.

    The template's tokens are counted if the tokenizer is on this machine. An endpoint's template is not known: it has
    at most the tokens of the shortest whole prompt seen. Until a prompt is seen, 1,024 are assumed, and rows are sent
    one at a time.
    """

    UNSEEN, MARGIN = 1024, 8

    def __init__(self, model: Model) -> None:
        self.model = model
        self.limit = None if model.engine == "http" else model.max_model_len  # an endpoint's limit may differ

    @cached_property
    def template(self) -> int | None:
        """Tokens of the template; None while they are not known. They are counted only if a budget needs them."""
        return template_tokens(self.model) if self.model.engine == "embedded" else None

    @property
    def known(self) -> bool:
        return self.template is not None

    def of(self, text: str) -> int:
        """The most tokens of a planned prompt."""
        prompt = unpack(text)
        turns = 1 if isinstance(prompt, str) else max(1, len(prompt))
        template = self.UNSEEN if self.template is None else self.template + self.MARGIN
        said = prompt if isinstance(prompt, str) else text
        tokens = len(encode_text(said)) + turns * template
        return tokens if self.limit is None else min(tokens, self.limit)

    def learn(self, usage: Usage) -> None:
        if usage.prompt_tokens and (self.template is None or usage.prompt_tokens < self.template):
            self.template = usage.prompt_tokens
