"""How the planner counts: tokens of a text, and tokens of a block of the engine's KV cache."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from complete_fn.text import encode_text

BYTES_PER_TOKEN = 3.5  # English prose with Llama 3's tokenizer has 4 to 4.5: this errs on the large side


def tokens_by_bytes(texts: list[str]) -> list[int]:
    """Tokens of each text where no tokenizer is at hand."""
    return [math.ceil(len(encode_text(t)) / BYTES_PER_TOKEN) for t in texts]


@dataclass(frozen=True)
class TokenSizes:
    """`count`: tokens of each bare text. `block`: tokens of a KV block, of which vLLM reuses only whole ones."""

    count: Callable[[list[str]], list[int]] = tokens_by_bytes
    block: int = 32


BY_BYTES = TokenSizes()
