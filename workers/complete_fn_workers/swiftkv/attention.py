"""The attention backend of SwiftKV's later layers: the platform's own, over only the tokens that need logits.

`CommonAttentionMetadata` is edited before the platform's builder sees it, so nothing here knows a kernel. Leaving
tokens out is an optimisation only: running the later layers on more tokens than needed is always exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    CommonAttentionMetadata,
    subclass_attention_backend,
)

from complete_fn_workers.swiftkv.limits import PromptWatcher


@dataclass(frozen=True)
class KeptTokens:
    """Which tokens of a step go through the later layers.

    `indices`: int64 [kept], positions in the step's flat token axis. `some_unfinished`: rows of unfinished prompts were
    left out as well; their last token is still sampled (and thrown away) by vLLM.
    """

    indices: torch.Tensor
    some_unfinished: bool


@dataclass(frozen=True)
class Selection:
    """Per request of the step: `rows` int64 [kept requests], `counts` int64 [kept requests] tail tokens of each."""

    rows: torch.Tensor
    counts: torch.Tensor
    indices: torch.Tensor


def select(query_start_loc: torch.Tensor, tail: int, finished: list[bool] | None) -> Selection:
    """The last `tail` tokens of every request that is `finished` (None: all), given int [requests + 1] starts."""
    starts = query_start_loc.to(torch.int64)
    counts = starts.diff().clamp(max=tail)
    if finished is not None:
        counts *= torch.tensor(finished)
    rows = counts.nonzero()[:, 0]
    counts = counts[rows]
    first = starts[1:][rows] - counts
    within = torch.arange(int(counts.sum())) - torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    return Selection(rows, counts, torch.repeat_interleave(first, counts) + within)


def reduced(common: CommonAttentionMetadata, chosen: Selection) -> CommonAttentionMetadata:
    """`common` over the chosen tokens only.

    They are the tail of their sequences, so causal masking from `seq_lens` and `query_start_loc` stays right. The slot
    mapping stays whole: keys and values of all tokens are written, not only of these.
    """
    device = common.query_start_loc.device
    starts = torch.zeros(len(chosen.rows) + 1, dtype=common.query_start_loc_cpu.dtype)
    torch.cumsum(chosen.counts, 0, out=starts[1:])
    changes: dict[str, Any] = {
        "query_start_loc": starts.to(device, non_blocking=True),
        "query_start_loc_cpu": starts,
        "num_actual_tokens": len(chosen.indices),
        "max_query_len": int(chosen.counts.max()),
        "logits_indices_padded": None,
        "num_logits_indices": None,
        "max_logits_per_req": None,
        "positions": None,
        "is_prefilling": None,
        "_num_computed_tokens_cache": None,
        "_token_to_req_indices_cache": None,
    }
    if len(chosen.rows) < common.num_reqs:
        rows = chosen.rows.to(device, non_blocking=True)
        changes |= {
            "num_reqs": len(chosen.rows),
            "seq_lens": common.seq_lens[rows],
            "block_table_tensor": common.block_table_tensor[rows],
        }
        if common.seq_lens_cpu_upper_bound is not None:
            changes["seq_lens_cpu_upper_bound"] = common.seq_lens_cpu_upper_bound[chosen.rows]
    return common.replace(**changes)


@lru_cache
def skipping_backend(backend: type[AttentionBackend]) -> type[AttentionBackend]:
    """`backend` with a builder that leaves out prompt tokens. One class per backend: vLLM groups layers by it."""
    base: Any = backend.get_builder_cls()

    class SkippingBuilder(base):  # type: ignore[misc]
        supports_update_block_table = False

        def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, *rest: Any) -> None:
            super().__init__(kv_cache_spec, layer_names, vllm_config, *rest)
            drafts = vllm_config.speculative_config
            self.tail = 1 + (drafts.num_speculative_tokens if drafts is not None else 0)
            self.skips = vllm_config.model_config.hf_config.swiftkv_skip_prefill

        @classmethod
        def get_cudagraph_support(cls, vllm_config: VllmConfig, kv_cache_spec: Any) -> AttentionCGSupport:
            # Only batches that are never reduced have the same shape when captured and when replayed.
            inner = super().get_cudagraph_support(vllm_config, kv_cache_spec)
            return min(inner, AttentionCGSupport.UNIFORM_BATCH, key=lambda level: level.value)

        def build(self, common_prefix_len: int, common: CommonAttentionMetadata, fast_build: bool = False) -> Any:
            kept = None
            if self.skips and common.max_query_len > self.tail:
                finished = self.finished(common)
                chosen = select(common.query_start_loc_cpu, self.tail, finished)
                kept = KeptTokens(
                    chosen.indices.to(common.query_start_loc.device, non_blocking=True),
                    finished is not None and not all(finished),
                )
                if len(chosen.indices):
                    common = reduced(common, chosen)
            metadata = super().build(0 if kept else common_prefix_len, common, fast_build)
            metadata.swiftkv_kept = kept
            return metadata

        def finished(self, common: CommonAttentionMetadata) -> list[bool] | None:
            watcher = PromptWatcher.running.get(id(self.vllm_config))
            if watcher is None or common.seq_lens_cpu_upper_bound is None:
                return None
            return watcher.finished(common.seq_lens_cpu_upper_bound.tolist())

    skipping: type[AttentionBackend] = subclass_attention_backend("SwiftKV", backend, SkippingBuilder)
    return skipping
