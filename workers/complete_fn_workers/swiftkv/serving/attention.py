"""SwiftKV's later layers use the platform's attention backend, over only the tokens that need logits.

`skipping_backend` edits vLLM's description of a step before the platform's builder reads it, so it needs no kernel of
its own. Leaving tokens out only saves time: running the later layers on more tokens than needed is always exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from vllm.config import VllmConfig

from complete_fn_workers.engine.vllm_internals import (
    StepQueries,
    at_most_uniform,
    builder_of,
    drafted_tokens,
    read_queries,
    reduce_queries,
    with_builder,
)
from complete_fn_workers.swiftkv.serving.limits import PromptWatcher


@dataclass(frozen=True)
class KeptTokens:
    """The tokens of a step that pass the later layers.

    Attributes:
        indices: int64 [kept], positions on the step's flat axis of tokens.
        some_unfinished: whether rows of unfinished prompts were left out too. vLLM still samples a token after their
            last one, and drops it.
    """

    indices: torch.Tensor
    some_unfinished: bool


@dataclass(frozen=True)
class Selection:
    """The kept tokens by request: `rows` int64 [kept requests], and `counts` int64 of the last tokens of each row."""

    rows: torch.Tensor
    counts: torch.Tensor
    indices: torch.Tensor


def select_tokens(query_start_loc: torch.Tensor, tail: int, finished: list[bool] | None) -> Selection:
    """The last `tail` tokens of every `finished` request (None: all). `query_start_loc`: int [requests + 1] starts."""
    starts = query_start_loc.to(torch.int64)
    counts = starts.diff().clamp(max=tail)
    if finished is not None:
        counts *= torch.tensor(finished)
    rows = counts.nonzero()[:, 0]
    counts = counts[rows]
    first = starts[1:][rows] - counts
    within = torch.arange(int(counts.sum())) - torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    return Selection(rows, counts, torch.repeat_interleave(first, counts) + within)


@lru_cache
def skipping_backend(backend: Any) -> Any:
    """`backend` with a builder that leaves out prompt tokens. Cached, because vLLM groups layers by the class."""
    base = builder_of(backend)

    class SkippingBuilder(base):  # type: ignore[misc, valid-type]
        # vLLM calls these methods by position or by keyword: the parameters have its names.
        supports_update_block_table = False

        def __init__(
            self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, *rest: Any, **more: Any
        ) -> None:
            super().__init__(kv_cache_spec, layer_names, vllm_config, *rest, **more)
            self.engine_id = id(vllm_config)
            self.tail = 1 + drafted_tokens(vllm_config)
            self.skips = vllm_config.model_config.hf_config.swiftkv_skip_prefill

        @classmethod
        def get_cudagraph_support(cls, vllm_config: VllmConfig, kv_cache_spec: Any) -> Any:
            # A CUDA graph needs the same shape at capture and replay, which only batches that are never reduced have.
            return at_most_uniform(super().get_cudagraph_support(vllm_config, kv_cache_spec))

        def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
            kept, common = None, common_attn_metadata
            queries = read_queries(common)
            if self.skips and queries.longest > self.tail:
                finished = self.finished(queries)
                chosen = select_tokens(queries.starts, self.tail, finished)
                kept = KeptTokens(
                    chosen.indices.to(queries.device, non_blocking=True), finished is not None and not all(finished)
                )
                if len(chosen.indices):
                    common = reduce_queries(common, chosen.rows, chosen.counts)
            metadata = super().build(0 if kept else common_prefix_len, common, fast_build)
            metadata.swiftkv_kept = kept
            return metadata

        def finished(self, queries: StepQueries) -> list[bool] | None:
            watcher = PromptWatcher.running.get(self.engine_id)
            if watcher is None or queries.reached is None:
                return None
            return watcher.finished(queries.reached.tolist())

    return with_builder(backend, "SwiftKV", SkippingBuilder)
