"""What SwiftKV cannot do, refused at start or at the request; and which prompts a step leaves unfinished."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, ClassVar

import torch
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, process_dict_updates
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as V2LogitsProcessor

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsContext

# Drafts that need nothing of the model but its logits.
DRAFTERS_WITHOUT_HIDDEN_STATES = ("ngram", "ngram_gpu", "suffix")

PROMPT_LOGPROBS = (
    "prompt_logprobs is not available: SwiftKV does not run the later layers on prompt tokens. Leave it out, or start "
    'the engine with hf_overrides={"swiftkv_skip_prefill": False}, which runs them (at plain Llama\'s prefill cost).'
)


def refuse_unsupported(vllm_config: VllmConfig) -> None:
    """Raise for engine settings under which SwiftKV would be wrong.

    Raises:
        ValueError: names the setting and what to do instead.
    """
    config, parallel = vllm_config.model_config.hf_config, vllm_config.parallel_config
    if config.num_key_value_layers >= config.num_hidden_layers:
        raise ValueError(
            f"num_key_value_layers is {config.num_key_value_layers} of {config.num_hidden_layers} layers: nothing is "
            "left to skip. Serve the checkpoint's parent as a plain Llama."
        )
    if getattr(config, "attention_bias", False):
        raise ValueError("SwiftKV checkpoints with attention_bias are not supported: none has been published.")
    if parallel.pipeline_parallel_size > 1:
        raise ValueError(
            f"SwiftKV runs on one pipeline stage (pipeline_parallel_size is {parallel.pipeline_parallel_size}): the "
            "later layers need the hidden state after layer K. Use tensor_parallel_size."
        )
    if (parallel.decode_context_parallel_size or 1) > 1 or (parallel.prefill_context_parallel_size or 1) > 1:
        raise ValueError("SwiftKV does not support context parallelism. Use tensor_parallel_size.")
    if parallel.use_ubatching:
        raise ValueError("SwiftKV does not support micro-batching (enable_dbo). Switch it off.")
    if vllm_config.model_config.runner_type != "generate":
        raise ValueError("SwiftKV generates text only: pooling reads prompt tokens that the later layers do not see.")
    if vllm_config.kv_transfer_config is not None:
        raise ValueError("SwiftKV with a KV connector (kv_transfer_config) has not been tried. Leave it out.")
    if vllm_config.lora_config is not None:
        raise ValueError("SwiftKV does not support LoRA. Merge the adapter into the checkpoint first.")
    if vllm_config.cache_config.kv_sharing_fast_prefill:
        raise ValueError("SwiftKV skips prompt tokens by itself; leave kv_sharing_fast_prefill off.")
    drafter = vllm_config.speculative_config
    if drafter is not None and drafter.method not in DRAFTERS_WITHOUT_HIDDEN_STATES:
        raise ValueError(
            f"Speculative method {drafter.method!r} needs hidden states of all prompt tokens, which SwiftKV does not "
            f"compute. Use one of {', '.join(DRAFTERS_WITHOUT_HIDDEN_STATES)}."
        )


class SwiftKVLimits(VerifyAndUpdateConfig):  # type: ignore[misc]
    """vLLM's hook for a model's own checks, run once as the engine's configuration is put together."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        refuse_unsupported(vllm_config)
        model = vllm_config.model_config
        # vLLM allows no custom processor beside speculation; there the unread rows are NaN (see model.py).
        if model.hf_config.swiftkv_skip_prefill and vllm_config.speculative_config is None:
            watcher = V2PromptWatcher if vllm_config.use_v2_model_runner else PromptWatcher
            model.logits_processors = [*(model.logits_processors or []), f"{__name__}:{watcher.__name__}"]


def refuse_prompt_logprobs(params: SamplingParams) -> None:
    if params.prompt_logprobs is not None or getattr(params, "prompt_logprob_token_ids", None) is not None:
        raise ValueError(PROMPT_LOGPROBS)


class PromptWatcher(LogitsProcessor):  # type: ignore[misc]
    """Refuses `prompt_logprobs`, changes no logits, and knows how long each row of the running batch must become.

    vLLM's attention metadata does not say whether a chunk completes its prompt; a logits processor is told of every
    request that enters, moves in or leaves the batch, before the step's metadata is built.
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
        process_dict_updates(
            self.rows,
            batch_update,
            # The output list is the request's own and grows; a preempted request must recompute it as well.
            lambda _params, prompt, output: None if prompt is None else (len(prompt), output),
        )

    def finished(self, seq_lens: list[int]) -> list[bool]:
        """Per row of the batch: whether `seq_lens[row]` tokens reach its last known token. Unknown rows count as so."""
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
