"""Tokens are counted by a model's own tokenizer.json, without an engine."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from complete_fn.engines.catalogue import Model
from complete_fn.text import without_surrogates
from complete_fn.tokens import TokenSizes, tokens_by_bytes

BLOCK = 32  # tokens of a KV block on a CPU; a whole block of 32 is also whole in a GPU's blocks of 16


def tokenizer_file(model: Model) -> Path | None:
    """The model's tokenizer.json in its folder or in the Hub's cache on this machine, else None. No network is used."""
    folder = model.local_folder
    if folder is not None:
        found = folder / "tokenizer.json"
        return found if found.exists() else None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(model.checkpoint, "tokenizer.json", revision=model.revision)
    except HFValidationError:
        return None
    return Path(cached) if isinstance(cached, str) else None


def count_with(file: Path, texts: list[str]) -> list[int]:
    """Tokens of each text, without special tokens.

    Texts are encoded one at a time: the library's own threads would print a warning if the process forks later.
    """
    tokenizer = read(file, file.stat().st_mtime_ns)
    return [len(tokenizer.encode(without_surrogates(text), add_special_tokens=False)) for text in texts]


def ids_with(file: Path, texts: list[str]) -> list[list[int]]:
    """Token ids of each text, without special tokens."""
    tokenizer = read(file, file.stat().st_mtime_ns)
    return [tokenizer.encode(without_surrogates(text), add_special_tokens=False).ids for text in texts]


def token_sizes(model: Model) -> TokenSizes:
    """The planner's counter of tokens for this model, and the size of its engine's blocks.

    Tokens are counted by the model's tokenizer if it is on this machine, or else by bytes.
    """

    def count(texts: list[str]) -> list[int]:
        file = tokenizer_file(model)
        return tokens_by_bytes(texts) if file is None else count_with(file, texts)

    return TokenSizes(count, int(model.engine_args.get("block_size") or BLOCK))


@lru_cache(maxsize=8)
def read(file: Path, written_ns: int) -> Any:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def template_tokens(model: Model) -> int | None:
    """Tokens that the chat template adds to one user message; None without a tokenizer, a template or Jinja."""
    file, around = tokenizer_file(model), template_around(model)
    if file is None or around is None or not any(around):
        return None
    together, alone = count_with(file, ["x".join(around), "x"])
    return together - alone


def template_around(model: Model) -> tuple[str, str] | None:
    """The chat template's texts before and behind one user message, empty without a template.

    None without a tokenizer or Jinja, or if the template fails.
    """
    file = tokenizer_file(model)
    if file is None:
        return None
    template = chat_template(file.parent)
    try:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ModuleNotFoundError:
        return None
    config = read_json(file.parent / "tokenizer_config.json")
    special = {k: v if isinstance(v, str) else "" for k, v in config.items() if k.endswith("_token")}
    try:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        text = environment.from_string(template).render(
            messages=[{"role": "user", "content": MARK}], add_generation_prompt=True, **special
        )
    except TemplateError:
        return None
    before, mark, behind = text.partition(MARK)
    return (before, behind) if mark else ("", "")


MARK = "-the-message-"


def chat_template(folder: Any) -> str:
    """The folder's chat template, from chat_template.jinja or tokenizer_config.json; empty if there is none."""
    own = folder / "chat_template.jinja"
    if own.exists():
        return str(own.read_text("utf-8"))
    found = read_json(folder / "tokenizer_config.json").get("chat_template")
    return found if isinstance(found, str) else ""


def read_json(path: Any) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
