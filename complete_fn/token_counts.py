"""Counting tokens with a model's own tokenizer.json, without an engine."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from complete_fn.catalogue import Model


def tokenizer_file(model: Model) -> Path | None:
    """The model's tokenizer.json: in its folder, or in the Hub's cache on this machine; else None. No network."""
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
    """Tokens of each bare text, no special tokens.

    One text at a time: the library's own threads would warn on the terminal of a user who forks later.
    """
    tokenizer = read(file, file.stat().st_mtime_ns)
    return [len(tokenizer.encode(encodable(text), add_special_tokens=False)) for text in texts]


def encodable(text: str) -> str:
    """The text with lone surrogates replaced, as nothing else can be tokenised."""
    return text.encode("utf-8", "replace").decode() if not text.isascii() else text


@lru_cache(maxsize=8)
def read(file: Path, written_ns: int) -> Any:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
