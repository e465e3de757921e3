"""A `Call` is a model and how it answers. An answer's key is a hash of everything that changes the answer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace

from complete_fn.engines.catalogue import Model
from complete_fn.engines.checkpoint import checkpoint_digest
from complete_fn.prompts.choices import most_tokens
from complete_fn.prompts.options import Options
from complete_fn.text import encode_text
from complete_fn.types import SamplingParams

# engine_args that change an answer's speed but not its text.
SPEED_ONLY = frozenset(
    (
        "block_size",
        "concurrency",
        "enable_prefix_caching",
        "enforce_eager",
        "gpu_memory_utilization",
        "kv_cache_memory_bytes",
        "long_prefill_token_threshold",
        "max_num_batched_tokens",
        "max_num_seqs",
        "scheduling_policy",
        "tensor_parallel_size",
        "timeout",
    )
)


@dataclass(frozen=True, slots=True)
class Call:
    """The model and the settings that all rows of one run share."""

    model: Model
    sampling: SamplingParams = SamplingParams()
    response_format: str | None = None
    choices: tuple[str, ...] = ()

    @classmethod
    def of(cls, model: Model, options: Options) -> Call:
        sampling, choices = options.sampling, options.choices
        if choices:
            sampling = replace(sampling, max_tokens=most_tokens(choices, model.engine))
        return cls(model, sampling, options.response_format, choices)

    @property
    def fingerprint(self) -> bytes:
        """SHA-256 over checkpoint, revision, engine_args, limits, sampling, schema and choices.

        The engine's version is left out.
        """
        what = {
            "checkpoint": checkpoint_digest(self.model),
            "engine_args": {k: v for k, v in self.model.engine_args.items() if k not in SPEED_ONLY},
            "max_model_len": self.model.max_model_len,
            "max_tokens": self.sampling.max_tokens or self.model.default_max_tokens,
            "sampling": asdict(self.sampling),
            "response_format": self.response_format,
            "choices": self.choices,
        }
        return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).digest()


def answer_keys(fingerprint: bytes, texts: Iterable[str]) -> list[bytes]:
    """One 32-byte key per text. A caller may pass another key as `fingerprint`, to derive keys from that key."""
    base = hashlib.sha256(fingerprint)
    keys = []
    for text in texts:
        h = base.copy()
        h.update(encode_text(text))
        keys.append(h.digest())
    return keys
