"""vLLM's insides: this module alone reads what vLLM does not offer to others.

vLLM offers what `vllm`, `vllm.config`, `vllm.inputs` and `vllm.sampling_params` export, its engine arguments and
environment variables, and what its documentation tells authors of plug-ins and models to build on: layers,
`support_torch_compile`, `ModelRegistry`, logits processors. Other modules use those directly.

The canaries (`tests/integration/workers/test_canaries_vllm.py`) read the table below and look up each name in the vLLM
that is installed. An entry is: where in vLLM, and the names there (of a function: its parameters); then which file
needs them for what, and why no public way does. All of them were seen in vLLM 0.32.0, the version of `engine.lock`.

vllm.v1.engine.llm_engine:LLMEngine  engine_core model_config vllm_config
vllm.v1.engine.core_client:InprocClient  engine_core
vllm.v1.engine.core:EngineCore  scheduler
vllm.v1.core.sched.scheduler:Scheduler  requests
    engine/steps/metering.py, to find the requests that are under way. Stat loggers, which are public, hear the sums of
    a step and what is finished. A scheduler of our own (scheduler_cls) would see it, but vLLM calls that interface not
    public too.
vllm.v1.request:Request  num_computed_tokens num_prompt_tokens prefill_stats
vllm.v1.metrics.stats:PrefillStats  num_cached_tokens
    engine/steps/metering.py, to charge a step to its rows by what it computed of each. As above: stat loggers hear
    sums.
vllm.config:VllmConfig  cache_config model_config parallel_config scheduler_config
vllm.config:ModelConfig  dtype hf_config hf_text_config max_model_len
vllm.config:CacheConfig  block_size cache_dtype num_gpu_blocks
vllm.config:ParallelConfig  world_size
vllm.config:SchedulerConfig  async_scheduling max_num_batched_tokens max_num_seqs
    engine/loop.py, to keep to the limits of the loaded engine. vLLM works them out at start and tells them nowhere
    else.
vllm.engine.arg_utils:EngineArgs.create_engine_config  usage_context
vllm.usage.usage_lib:UsageContext  LLM_CLASS
vllm.config:CacheConfig  kv_cache_memory_bytes
vllm.config:ModelConfig  get_head_size get_num_kv_heads get_num_layers
    engine/config.py, to bound the KV cache and to add seats for chats. Both depend on what vLLM makes of the engine
    arguments, so they are set between that and the start.
vllm.transformers_utils.config:get_config  model trust_remote_code revision
    engine/config.py, to read a checkpoint's configuration as vLLM does. transformers does not know all of vLLM's.
vllm.config:VllmConfig  compilation_config kv_transfer_config lora_config speculative_config use_v2_model_runner
vllm.config:CompilationConfig  cudagraph_mode
vllm.config:CUDAGraphMode  NONE
vllm.config:ModelConfig  logits_processors runner_type
vllm.config:CacheConfig  kv_sharing_fast_prefill
vllm.config:ParallelConfig  decode_context_parallel_size pipeline_parallel_size prefill_context_parallel_size
vllm.config:ParallelConfig  use_ubatching
vllm.config:SpeculativeConfig  method num_speculative_tokens
    swiftkv/serving/limits.py, to refuse settings under which SwiftKV would be wrong. The checks read what vLLM settled
    on.
vllm.model_executor.models.config  MODELS_CONFIG_MAP
vllm.model_executor.models.config:VerifyAndUpdateConfig  verify_and_update_config verify_and_update_model_config
    swiftkv/serving/plugin.py, to check the settings before the model runner reads them. ModelRegistry has no hook
    before that.
vllm.v1.sample.logits_processor:process_dict_updates  req_entries batch_update new_state
vllm.v1.sample.logits_processor:LogitsProcessor  apply is_argmax_invariant update_state validate_params
vllm.v1.worker.gpu.sample.logits_processor:LogitsProcessor  add_request apply validate_params
    swiftkv/serving/limits.py, to know which prompts a step completes, and to refuse prompt_logprobs. The processors are
    public, but vLLM says that they may still change; the helper that keeps track of rows is not documented.
vllm.sampling_params:SamplingParams  logprob_token_ids prompt_logprob_token_ids prompt_logprobs skip_clone
    swiftkv/serving/limits.py and engine/rows.py, to refuse or ask for log-probabilities, and to share parameters
    between rows. The class is public; some of these fields are documented in its source only.
vllm.forward_context  get_forward_context
vllm.forward_context:ForwardContext  attn_metadata cudagraph_runtime_mode
    swiftkv/serving/model.py, to hand only the kept tokens to the later layers. vLLM tells a model's forward nothing of
    it.
vllm.model_executor.layers.attention:Attention  layer_name
vllm.model_executor.layers.attention:Attention.__init__  attn_backend kv_sharing_target_layer_name
vllm.model_executor.layers.attention.attention:unified_kv_cache_update  key value layer_name
vllm.utils.torch_utils:_encode_layer_name  layer_name
    swiftkv/serving/model.py, to write the keys and values of all tokens into the cache. Attention writes only those of
    the tokens that it is called with.
vllm.compilation.backends:set_model_tag  tag
    swiftkv/serving/model.py, to compile two units of one model. support_torch_compile tells them apart by this tag
    only.
vllm.model_executor.models.llama:LlamaDecoderLayer.__init__  vllm_config prefix
vllm.model_executor.models.llama:LlamaDecoderLayer.forward  positions hidden_states residual
vllm.model_executor.models.llama:LlamaMLP.__init__  hidden_size intermediate_size hidden_act quant_config bias prefix
vllm.model_executor.layers.linear:QKVParallelLinear.__init__  total_num_heads total_num_kv_heads
vllm.model_executor.models.utils:WeightsMapper  orig_to_new_regex orig_to_new_stacked
vllm.model_executor.models.utils:AutoWeightsLoader.load_weights  weights mapper
    swiftkv/serving/model.py, to be built of vLLM's own parts. Those are for authors of models, but not stable between
    versions.
vllm.v1.attention.selector:get_attn_backend  head_size dtype kv_cache_dtype
vllm.v1.attention.backend:AttentionBackend  get_builder_cls
vllm.v1.attention.backend:subclass_attention_backend  name_prefix attention_backend_cls builder_cls
vllm.v1.attention.backend:AttentionMetadataBuilder  build get_cudagraph_support supports_update_block_table
vllm.v1.attention.backend:AttentionMetadataBuilder.__init__  kv_cache_spec layer_names vllm_config
vllm.v1.attention.backend:AttentionMetadataBuilder.build  common_prefix_len common_attn_metadata fast_build
vllm.v1.attention.backend:AttentionMetadataBuilder.get_cudagraph_support  vllm_config kv_cache_spec
vllm.v1.attention.backend:AttentionCGSupport  UNIFORM_BATCH
    swiftkv/serving/attention.py, to leave prompt tokens out of the later layers. Backends can be registered publicly by
    name, but only whole ones, one for all layers.
vllm.v1.attention.backend:CommonAttentionMetadata  replace query_start_loc query_start_loc_cpu seq_lens num_reqs
vllm.v1.attention.backend:CommonAttentionMetadata  num_actual_tokens max_query_len block_table_tensor
vllm.v1.attention.backend:CommonAttentionMetadata  logits_indices_padded num_logits_indices max_logits_per_req positions
vllm.v1.attention.backend:CommonAttentionMetadata  is_prefilling seq_lens_cpu_upper_bound
vllm.v1.attention.backend:CommonAttentionMetadata  _num_computed_tokens_cache _token_to_req_indices_cache
    swiftkv/serving/attention.py, to describe a step without the tokens that are left out. There is no smaller
    description.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch

# Fields of CommonAttentionMetadata that stay as they are when tokens are left out: those of all tokens written, bounds
# that still hold, and those of models and modes that SwiftKV refuses.
UNCHANGED_FIELDS = frozenset(
    {
        "slot_mapping",
        "causal",
        "max_seq_len",
        "encoder_seq_lens",
        "encoder_seq_lens_cpu",
        "dcp_local_seq_lens",
        "dcp_local_seq_lens_cpu_upper_bound",
        "req_idx",
        "mm_req_doc_ranges",
        "rswa_prefix_lens",
        "replayssm_decode_base_cpu",
    }
)


class EngineFacts(NamedTuple):
    """What a loaded engine is.

    Attributes:
        context: tokens of a prompt with its answer, at most.
        rows, step_tokens: what one step takes, at most.
        cache_blocks, block_tokens: the size of the KV cache.
        devices: how many compute each step.
        overlaps: whether a step is scheduled while the one before is computed.
        weight_bytes, cache_bytes: of one weight, of one cached number.
        config, text_config: transformers' of the model, of its language part.
    """

    context: int
    rows: int
    step_tokens: int
    cache_blocks: int
    block_tokens: int
    devices: int
    overlaps: bool
    weight_bytes: int
    cache_bytes: int
    config: Any
    text_config: Any


def read_engine(llm: Any) -> EngineFacts:
    model, settings = llm.model_config, llm.vllm_config
    weight_bytes = int(model.dtype.itemsize)
    return EngineFacts(
        context=int(model.max_model_len),
        rows=int(settings.scheduler_config.max_num_seqs),
        step_tokens=int(settings.scheduler_config.max_num_batched_tokens),
        cache_blocks=int(settings.cache_config.num_gpu_blocks),
        block_tokens=int(settings.cache_config.block_size),
        devices=int(settings.parallel_config.world_size),
        overlaps=bool(settings.scheduler_config.async_scheduling),
        weight_bytes=weight_bytes,
        cache_bytes=1 if str(settings.cache_config.cache_dtype).startswith("fp8") else weight_bytes,
        config=model.hf_config,
        text_config=model.hf_text_config,
    )


def requests_under_way(llm: Any) -> Mapping[str, Any]:
    """vLLM's requests by the ids that `add_request` returns. The mapping is live."""
    requests: Mapping[str, Any] = llm.engine_core.engine_core.scheduler.requests
    return requests


def prefill_of(request: Any) -> Any:
    """The request's prefill counts. Take them while the request is new: vLLM hands them on with the first token."""
    return request.prefill_stats


def cached_tokens(prefill: Any) -> int:
    """Tokens of the prompt that were in the cache when the request was first scheduled."""
    return int(prefill.num_cached_tokens)


def computed_tokens(request: Any) -> int:
    """Tokens of prompt and answer whose keys and values exist, with the cached ones.

    The count falls back when the request is preempted; where steps overlap, it has the tokens of the step under way.
    """
    return int(request.num_computed_tokens)


def prompt_tokens(request: Any) -> int:
    return int(request.num_prompt_tokens)


def create_config(arguments: Mapping[str, Any]) -> Any:
    """vLLM's configuration of these engine arguments, with the defaults of its offline class."""
    from vllm import EngineArgs
    from vllm.usage.usage_lib import UsageContext

    return EngineArgs(**arguments).create_engine_config(usage_context=UsageContext.LLM_CLASS)


def add_seats(config: Any, seats: int) -> None:
    """Let a step take `seats` more rows."""
    config.scheduler_config.max_num_seqs += seats


def set_cache_bytes(config: Any, size: int) -> None:
    config.cache_config.kv_cache_memory_bytes = size


def full_cache_bytes(config: Any) -> int:
    """Bytes of KV cache with every sequence at full length: 2 x layers x KV heads x head size x bytes a token."""
    model, parallel = config.model_config, config.parallel_config
    layers, heads = model.get_num_layers(parallel), model.get_num_kv_heads(parallel)
    token = 2 * layers * heads * int(model.get_head_size()) * model.dtype.itemsize
    block = int(config.cache_config.block_size or 32)
    rows = config.scheduler_config.max_num_seqs + 1
    return int(token * (model.max_model_len + block) * rows)


def checkpoint_config(checkpoint: str, revision: str | None) -> Any:
    """transformers' configuration of a checkpoint, as vLLM reads it; code in the checkpoint is never run."""
    from vllm.transformers_utils.config import get_config

    return get_config(model=checkpoint, trust_remote_code=False, revision=revision)


class ServingSettings(NamedTuple):
    """What SwiftKV must know of an engine's settings before it starts."""

    pipeline_stages: int
    context_ranks: int
    micro_batches: bool
    generates: bool
    has_connector: bool
    has_lora: bool
    has_fast_prefill: bool
    drafter: str | None


def read_settings(config: Any) -> ServingSettings:
    parallel = config.parallel_config
    decode, prefill = parallel.decode_context_parallel_size, parallel.prefill_context_parallel_size
    return ServingSettings(
        pipeline_stages=parallel.pipeline_parallel_size,
        context_ranks=max(decode or 1, prefill or 1),
        micro_batches=bool(parallel.use_ubatching),
        generates=config.model_config.runner_type == "generate",
        has_connector=config.kv_transfer_config is not None,
        has_lora=config.lora_config is not None,
        has_fast_prefill=bool(config.cache_config.kv_sharing_fast_prefill),
        drafter=None if config.speculative_config is None else str(config.speculative_config.method),
    )


def drafted_tokens(config: Any) -> int:
    """Tokens that a drafter guesses in a step for each row."""
    drafts = config.speculative_config
    return 0 if drafts is None else int(drafts.num_speculative_tokens)


def register_check(architecture: str, check: Callable[[Any], None]) -> None:
    """Have vLLM call `check` with the configuration of every engine for this architecture, before it starts."""
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

    class Checked(VerifyAndUpdateConfig):  # type: ignore[misc]
        @staticmethod
        def verify_and_update_config(vllm_config: Any) -> None:
            check(vllm_config)

    MODELS_CONFIG_MAP[architecture] = Checked


def add_logits_processor(config: Any, first_runner: str, second_runner: str) -> None:
    """Add a logits processor, named `module:class`: the one for the model runner that the engine will use."""
    model = config.model_config
    chosen = second_runner if config.use_v2_model_runner else first_runner
    model.logits_processors = [*(model.logits_processors or []), chosen]


def asks_prompt_logprobs(params: Any) -> bool:
    return params.prompt_logprobs is not None or params.prompt_logprob_token_ids is not None


def follow_rows(rows: dict[int, Any], update: Any, remember: Callable[[Any, Any, Any], Any]) -> None:
    """Keep `rows`, by place in the running batch, up to date: `remember` makes an entry of a request that enters.

    `remember` gets the sampling parameters, the prompt's tokens and the answer's tokens so far; None is no entry.
    """
    from vllm.v1.sample.logits_processor import process_dict_updates

    process_dict_updates(rows, update, remember)


def metadata_of(attention: Any) -> Any:
    """The attention backend's metadata of the running step, for this layer; None in a profiling run."""
    from vllm.forward_context import get_forward_context

    layers = get_forward_context().attn_metadata
    return None if layers is None else layers[attention.layer_name]


def write_cache(attention: Any, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Write keys and values of all tokens of the step into the layer's cache, whatever its backend."""
    import torch
    from vllm.utils.torch_utils import _encode_layer_name

    torch.ops.vllm.unified_kv_cache_update(keys, values, _encode_layer_name(attention.layer_name))


@contextmanager
def outside_graphs() -> Iterator[None]:
    """Run without CUDA graphs: the step's graph is for another number of tokens."""
    from vllm.config import CUDAGraphMode
    from vllm.forward_context import get_forward_context

    context = get_forward_context()
    mode, context.cudagraph_runtime_mode = context.cudagraph_runtime_mode, CUDAGraphMode.NONE
    try:
        yield
    finally:
        context.cudagraph_runtime_mode = mode


def captured_tokens(config: Any) -> int | None:
    """Tokens of the largest step that a CUDA graph can replay; None where no graphs are captured."""
    from vllm.config import CUDAGraphMode

    mode = config.compilation_config.cudagraph_mode
    if mode is None or mode == CUDAGraphMode.NONE:
        return None
    return int(config.scheduler_config.max_num_batched_tokens)


def compiled_unit(tag: str) -> AbstractContextManager[None]:
    """Modules made in this context are compiled apart from the rest of the model."""
    from vllm.compilation.backends import set_model_tag

    unit: AbstractContextManager[None] = set_model_tag(tag)
    return unit


def platform_backend(head_size: int, dtype: torch.dtype, cache_dtype: str) -> Any:
    """The attention backend that vLLM would choose on this platform."""
    from vllm.v1.attention.selector import get_attn_backend

    return get_attn_backend(head_size, dtype, cache_dtype)


def builder_of(backend: Any) -> Any:
    return backend.get_builder_cls()


def with_builder(backend: Any, name: str, builder: Any) -> Any:
    """A subclass of the backend, its name with `name` in front, that differs in its metadata builder only."""
    from vllm.v1.attention.backend import subclass_attention_backend

    return subclass_attention_backend(name, backend, builder)


def at_most_uniform(level: Any) -> Any:
    """The level of CUDA graph support, but no more than for batches whose rows have equally many tokens."""
    from vllm.v1.attention.backend import AttentionCGSupport

    return min(level, AttentionCGSupport.UNIFORM_BATCH, key=lambda support: support.value)


class StepQueries(NamedTuple):
    """The tokens that a step computes, row by row.

    Attributes:
        starts: [rows + 1], on the CPU: where each row begins on the flat axis of tokens.
        longest: the most tokens of a row.
        device: where the tokens are.
        reached: [rows], on the CPU: the length of each sequence after the step; None where vLLM does not know it there.
    """

    starts: torch.Tensor
    longest: int
    device: torch.device
    reached: torch.Tensor | None


def read_queries(common: Any) -> StepQueries:
    """Args: common: vLLM's `CommonAttentionMetadata` of the step."""
    return StepQueries(
        common.query_start_loc_cpu,
        common.max_query_len,
        common.query_start_loc.device,
        common.seq_lens_cpu_upper_bound,
    )


def reduce_queries(common: Any, rows: torch.Tensor, counts: torch.Tensor) -> Any:
    """`common` over the last `counts[i]` tokens of each row `rows[i]` only.

    The tokens are the tail of their sequences, so causal masking from `seq_lens` and `query_start_loc` stays right. The
    slot mapping stays whole: keys and values of all tokens are written, not only of these.
    """
    import torch

    device = common.query_start_loc.device
    starts = torch.zeros(len(rows) + 1, dtype=common.query_start_loc_cpu.dtype)
    torch.cumsum(counts, 0, out=starts[1:])
    changes: dict[str, Any] = {
        "query_start_loc": starts.to(device, non_blocking=True),
        "query_start_loc_cpu": starts,
        "num_actual_tokens": int(counts.sum()),
        "max_query_len": int(counts.max()),
        "logits_indices_padded": None,
        "num_logits_indices": None,
        "max_logits_per_req": None,
        "positions": None,
        "is_prefilling": None,
        "_num_computed_tokens_cache": None,
        "_token_to_req_indices_cache": None,
    }
    if len(rows) < common.num_reqs:
        there = rows.to(device, non_blocking=True)
        changes |= {
            "num_reqs": len(rows),
            "seq_lens": common.seq_lens[there],
            "block_table_tensor": common.block_table_tensor[there],
        }
        if common.seq_lens_cpu_upper_bound is not None:
            changes["seq_lens_cpu_upper_bound"] = common.seq_lens_cpu_upper_bound[rows]
    return common.replace(**changes)
