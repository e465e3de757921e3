"""SwiftKV's limits are enforced at the engine's start or at the request. A watcher knows the unfinished prompts."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, ClassVar

import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as V2LogitsProcessor

from complete_fn_workers.engine.vllm_internals import (
    add_logits_processor,
    asks_prompt_logprobs,
    follow_rows,
    read_settings,
)

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext

# Speculative methods that need only the model's logits.
DRAFTERS_WITHOUT_HIDDEN_STATES = ("ngram", "ngram_gpu", "suffix")

PROMPT_LOGPROBS = (
    "prompt_logprobs is not available: SwiftKV does not run the later layers on prompt tokens. Leave it out, or start "
    'the engine with hf_overrides={"swiftkv_skip_prefill": False}, which runs them (at plain Llama\'s prefill cost).'
)


def refuse_unsupported(vllm_config: VllmConfig) -> None:
    """Refuse engine settings under which SwiftKV would be wrong.

    Raises:
        ValueError: A setting is not supported; the message names it and what to do instead.
    """
    config, settings = vllm_config.model_config.hf_config, read_settings(vllm_config)
    if config.num_key_value_layers >= config.num_hidden_layers:
        raise ValueError(
            f"num_key_value_layers is {config.num_key_value_layers} of {config.num_hidden_layers} layers: nothing is "
            "left to skip. Serve the checkpoint's parent as a plain Llama."
        )
    if getattr(config, "attention_bias", False):
        raise ValueError("SwiftKV checkpoints with attention_bias are not supported: none has been published.")
    if settings.pipeline_stages > 1:
        raise ValueError(
            f"SwiftKV runs on one pipeline stage (pipeline_parallel_size is {settings.pipeline_stages}): the later "
            "layers need the hidden state after layer K. Use tensor_parallel_size."
        )
    if settings.context_ranks > 1:
        raise ValueError("SwiftKV does not support context parallelism. Use tensor_parallel_size.")
    if settings.micro_batches:
        raise ValueError("SwiftKV does not support micro-batching (enable_dbo). Switch it off.")
    if not settings.generates:
        raise ValueError("SwiftKV generates text only: pooling reads prompt tokens that the later layers do not see.")
    if settings.has_connector:
        raise ValueError("SwiftKV with a KV connector (kv_transfer_config) has not been tried. Leave it out.")
    if settings.has_lora:
        raise ValueError("SwiftKV does not support LoRA. Merge the adapter into the checkpoint first.")
    if settings.has_fast_prefill:
        raise ValueError("SwiftKV skips prompt tokens by itself; leave kv_sharing_fast_prefill off.")
    if settings.drafter is not None and settings.drafter not in DRAFTERS_WITHOUT_HIDDEN_STATES:
        raise ValueError(
            f"Speculative method {settings.drafter!r} needs hidden states of all prompt tokens, which SwiftKV does not "
            f"compute. Use one of {', '.join(DRAFTERS_WITHOUT_HIDDEN_STATES)}."
        )


def set_limits(vllm_config: VllmConfig) -> None:
    """Enforce SwiftKV's limits. vLLM calls this once, when it makes the engine's configuration.

    Raises:
        ValueError: A setting is not supported; the message names it and what to do instead.
    """
    refuse_unsupported(vllm_config)
    # vLLM allows no custom processor beside speculative decoding; then skipped rows are NaN (see model.py).
    if vllm_config.model_config.hf_config.swiftkv_skip_prefill and read_settings(vllm_config).drafter is None:
        first, second = (f"{__name__}:{watcher.__name__}" for watcher in (PromptWatcher, V2PromptWatcher))
        add_logits_processor(vllm_config, first, second)


def refuse_prompt_logprobs(params: SamplingParams) -> None:
    if asks_prompt_logprobs(params):
        raise ValueError(PROMPT_LOGPROBS)


class PromptWatcher(LogitsProcessor):  # type: ignore[misc]
    """Refuses `prompt_logprobs`, changes no logits, and knows how long each row of the running batch must become.

    vLLM's attention metadata does not say whether a chunk completes its prompt. But vLLM tells a logits processor of
    every request that enters, moves in or leaves the batch, before it builds the step's metadata.
    """

    running: ClassVar[weakref.WeakValueDictionary[int, PromptWatcher]] = weakref.WeakValueDictionary()

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        refuse_prompt_logprobs(sampling_params)

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self.rows: dict[int, tuple[int, list[int]]] = {}
        PromptWatcher.running[id(vllm_config)] = self

    def is_argmax_invariant(self) -> bool:
        return True

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        return logits

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        follow_rows(
            self.rows,
            batch_update,
            # The output list is the request's own and grows. It counts, as a preempted request must recompute it too.
            lambda _params, prompt, output: None if prompt is None else (len(prompt), output),
        )

    def finished(self, seq_lens: list[int]) -> list[bool]:
        """Whether `seq_lens[row]` tokens reach each row's last known token. Unknown rows count as finished."""
        goals = (self.rows.get(row) for row in range(len(seq_lens)))
        return [goal is None or length >= goal[0] + len(goal[1]) for goal, length in zip(goals, seq_lens, strict=True)]


class V2PromptWatcher(V2LogitsProcessor):  # type: ignore[misc]
    """Refuses `prompt_logprobs` under vLLM's second model runner; changes no logits."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        refuse_prompt_logprobs(sampling_params)

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        return False

    def apply(self, logits: torch.Tensor, ctx: LogitsContext) -> torch.Tensor:
        return logits
