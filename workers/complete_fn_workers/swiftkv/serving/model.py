"""SwiftKV-Llama (arXiv 2410.03960) on vLLM, out of tree: later layers run only on the tokens whose logits are needed.

Layers below K = `num_key_value_layers` are vLLM's own. After them one norm gives the input of every later layer's keys
and values, which are written to the cache for all tokens. Then the later layers run on the tokens that `attention.py`
keeps.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import regex  # type: ignore[import-untyped]
import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.interfaces import SupportsQuant
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaMLP
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, maybe_prefix
from vllm.sequence import IntermediateTensors

from complete_fn_workers.engine.vllm_internals import (
    captured_tokens,
    compiled_unit,
    metadata_of,
    outside_graphs,
    platform_backend,
    write_cache,
)
from complete_fn_workers.swiftkv.serving.attention import KeptTokens, skipping_backend
from complete_fn_workers.swiftkv.serving.config import LlamaSwiftKVConfig
from complete_fn_workers.swiftkv.serving.limits import refuse_unsupported


class LateAttention(nn.Module):
    """The attention of one later layer, over the cache of its group's owner. Only the owner has `kv_proj_swiftkv`."""

    def __init__(self, vllm_config: VllmConfig, layer: int, model_prefix: str) -> None:
        super().__init__()
        config: LlamaSwiftKVConfig = vllm_config.model_config.hf_config
        quant, cache = vllm_config.quant_config, vllm_config.cache_config
        prefix = f"{model_prefix}.layers.{layer}.self_attn"
        owner = config.cache_owner(layer)
        ranks = get_tensor_model_parallel_world_size()
        heads, kv_heads = config.num_attention_heads // ranks, max(1, config.num_key_value_heads // ranks)
        self.q_proj_swiftkv = ColumnParallelLinear(
            config.hidden_size,
            config.num_attention_heads * config.head_dim,
            bias=False,
            quant_config=quant,
            prefix=f"{prefix}.q_proj_swiftkv",
        )
        self.kv_proj_swiftkv: QKVParallelLinear | None = None
        if owner == layer:
            self.kv_proj_swiftkv = QKVParallelLinear(
                config.hidden_size,
                config.head_dim,
                total_num_heads=0,
                total_num_kv_heads=config.num_key_value_heads,
                bias=False,
                quant_config=quant,
                prefix=f"{prefix}.kv_proj_swiftkv",
            )
        self.o_proj = RowParallelLinear(
            config.num_attention_heads * config.head_dim,
            config.hidden_size,
            bias=False,
            quant_config=quant,
            prefix=f"{prefix}.o_proj",
        )
        self.rotary_emb = get_rope(
            config.head_dim, max_position=config.max_position_embeddings, rope_parameters=config.rope_parameters
        )
        self.of_keys = (-1, kv_heads, config.head_dim)
        backend = platform_backend(config.head_dim, torch.get_default_dtype(), cache.cache_dtype)
        self.attn = Attention(
            heads,
            config.head_dim,
            config.head_dim**-0.5,
            num_kv_heads=kv_heads,
            cache_config=cache,
            quant_config=quant,
            prefix=f"{prefix}.attn",
            attn_backend=skipping_backend(backend),
            kv_sharing_target_layer_name=None if owner == layer else f"{model_prefix}.layers.{owner}.self_attn.attn",
        )

    def keys_values(self, positions: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys after RoPE, and values, of all tokens: each [tokens, kv heads, head size], from x [tokens, hidden]."""
        assert self.kv_proj_swiftkv is not None
        both, _ = self.kv_proj_swiftkv(x)
        keys, values = both.chunk(2, dim=-1)
        keys, _ = self.rotary_emb(positions, keys.contiguous(), None)
        return keys.view(self.of_keys), values.contiguous().view(self.of_keys)

    def forward(self, positions: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        queries, _ = self.q_proj_swiftkv(hidden)
        queries, _ = self.rotary_emb(positions, queries, None)
        mixed = self.attn(queries, None, None)  # without keys vLLM does not write to the cache
        out, _ = self.o_proj(mixed)
        return out  # type: ignore[no-any-return]


class LateLayer(nn.Module):
    """Llama's decoder layer, except for the source of its keys and values."""

    def __init__(self, vllm_config: VllmConfig, layer: int, model_prefix: str) -> None:
        super().__init__()
        config: LlamaSwiftKVConfig = vllm_config.model_config.hf_config
        self.self_attn = LateAttention(vllm_config, layer, model_prefix)
        self.mlp = LlamaMLP(
            config.hidden_size,
            config.intermediate_size,
            config.hidden_act,
            quant_config=vllm_config.quant_config,
            bias=config.mlp_bias,
            prefix=f"{model_prefix}.layers.{layer}.mlp",
        )
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self, positions: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if residual is None:
            residual = hidden
            hidden = self.input_layernorm(hidden)
        else:
            hidden, residual = self.input_layernorm(hidden, residual)
        hidden = self.self_attn(positions, hidden)
        hidden, residual = self.post_attention_layernorm(hidden, residual)
        return self.mlp(hidden), residual


@support_torch_compile(dynamic_arg_dims={"input_ids": 0, "positions": 0, "inputs_embeds": 0})
class EarlyUnit(nn.Module):
    """The modules that all tokens pass: the first K layers, then the later layers' keys and values."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", model: list[SwiftKVModel]) -> None:
        super().__init__()
        self.model = model  # in a list, so that its parameters are not registered twice

    def forward(
        self, input_ids: torch.Tensor | None, positions: torch.Tensor, inputs_embeds: torch.Tensor | None
    ) -> tuple[torch.Tensor, ...]:
        """The residual stream [tokens, hidden], then keys and values of each cache owner in turn."""
        model = self.model[0]
        hidden = model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        residual = None
        for layer in model.layers[: model.kept_layers]:
            hidden, residual = layer(positions, hidden, residual)
        x, stream = model.norm_swiftkv(hidden, residual)
        caches = [tensor for owner in model.owners for tensor in owner.keys_values(positions, x)]
        return stream, *caches


@support_torch_compile(dynamic_arg_dims={"positions": 0, "stream": 0})
class LateUnit(nn.Module):
    """The later layers and the final norm, on the kept tokens."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", model: list[SwiftKVModel]) -> None:
        super().__init__()
        self.model = model

    def forward(self, positions: torch.Tensor, stream: torch.Tensor) -> torch.Tensor:
        """The hidden states [kept, hidden] after the final norm, from positions [kept] and stream [kept, hidden]."""
        model = self.model[0]
        hidden, residual = stream, None
        for layer in model.layers[model.kept_layers :]:
            hidden, residual = layer(positions, hidden, residual)
        hidden, _ = model.norm(hidden, residual)
        return hidden  # type: ignore[no-any-return]


class SwiftKVModel(nn.Module):
    """The decoder. It is not compiled itself: it passes the compiled early unit's result to the compiled late unit."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config: LlamaSwiftKVConfig = vllm_config.model_config.hf_config
        self.kept_layers = config.num_key_value_layers
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, quant_config=vllm_config.quant_config
        )
        self.layers = nn.ModuleList(
            LlamaDecoderLayer(vllm_config=vllm_config, prefix=f"{prefix}.layers.{i}")
            if i < self.kept_layers
            else LateLayer(vllm_config, i, prefix)
            for i in range(config.num_hidden_layers)
        )
        self.norm_swiftkv = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        later = range(self.kept_layers, config.num_hidden_layers)
        self.owners: list[LateAttention] = [
            self.layers[i].self_attn  # type: ignore[misc]
            for i in later
            if config.cache_owner(i) == i
        ]
        with compiled_unit("swiftkv_early"):
            self.early = EarlyUnit(vllm_config=vllm_config, prefix=prefix, model=[self])
        with compiled_unit("swiftkv_late"):
            self.late = LateUnit(vllm_config=vllm_config, prefix=prefix, model=[self])
        self.graph_inputs: tuple[torch.Tensor, torch.Tensor] | None = None
        if (most := captured_tokens(vllm_config)) is not None:
            # A CUDA graph replays from the addresses with which it was captured, so its inputs need fixed buffers.
            weight = self.norm.weight
            self.graph_inputs = (
                torch.zeros(most, dtype=torch.int64, device=weight.device),
                torch.zeros(most, config.hidden_size, dtype=weight.dtype, device=weight.device),
            )

    def forward(
        self, input_ids: torch.Tensor | None, positions: torch.Tensor, inputs_embeds: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The hidden states [tokens, hidden]. Rows that were not kept have no answer and are never sampled from."""
        stream, *caches = self.early(input_ids, positions, inputs_embeds)
        step = metadata_of(self.owners[0].attn)
        if step is None:  # a profiling run, which must see the largest possible step
            return self.late_on_all(positions, stream)
        for owner, keys, values in zip(self.owners, caches[::2], caches[1::2], strict=True):
            write_cache(owner.attn, keys, values)
        kept: KeptTokens | None = step.swiftkv_kept
        if kept is None:
            return self.late_on_all(positions, stream)
        return self.late_on_some(kept, positions, stream)

    def late_on_all(self, positions: torch.Tensor, stream: torch.Tensor) -> torch.Tensor:
        if self.graph_inputs is None:
            return self.late(positions, stream)  # type: ignore[no-any-return]
        tokens = len(positions)
        fixed_positions, fixed_stream = (buffer[:tokens] for buffer in self.graph_inputs)
        fixed_positions.copy_(positions)
        fixed_stream.copy_(stream)
        return self.late(fixed_positions, fixed_stream)  # type: ignore[no-any-return]

    def late_on_some(self, kept: KeptTokens, positions: torch.Tensor, stream: torch.Tensor) -> torch.Tensor:
        # A skipped row is NaN, so that a wrong reader is noticed. But the sampler draws (and drops) a token for the
        # last row of an unfinished prompt, and must not find NaN there.
        out = torch.full_like(stream, 0.0 if kept.some_unfinished else torch.nan)
        if len(kept.indices):
            with outside_graphs():  # the step's graph is for another number of tokens than the kept ones
                out[kept.indices] = self.late(positions[kept.indices], stream[kept.indices])
        return out


class LlamaSwiftKVForCausalLM(nn.Module, SupportsQuant):  # type: ignore[misc]
    """Loads the published format, with the teacher's unused projections, and ours without them; fused or separate."""

    packed_modules_mapping: ClassVar[dict[str, list[str]]] = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "kv_proj_swiftkv": ["k_proj_swiftkv", "v_proj_swiftkv"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        refuse_unsupported(vllm_config)
        self.config: LlamaSwiftKVConfig = vllm_config.model_config.hf_config
        self.model = SwiftKVModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.lm_head = ParallelLMHead(
            self.config.vocab_size,
            self.config.hidden_size,
            quant_config=vllm_config.quant_config,
            prefix=maybe_prefix(prefix, "lm_head"),
        )
        if self.config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(self.config.vocab_size)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model.embed_tokens(input_ids)  # type: ignore[no-any-return]

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return self.model(input_ids, positions, inputs_embeds)  # type: ignore[no-any-return]

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        return self.logits_processor(self.lm_head, hidden_states)  # type: ignore[no-any-return]

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return AutoWeightsLoader(self).load_weights(weights, mapper=checkpoint_names(self.config))  # type: ignore[no-any-return]


def checkpoint_names(config: LlamaSwiftKVConfig) -> WeightsMapper:
    """Maps checkpoint names to ours. The teacher's projections of later layers are dropped, as no module uses them."""
    later = "|".join(str(i) for i in range(config.num_key_value_layers, config.num_hidden_layers))
    return WeightsMapper(
        orig_to_new_regex={regex.compile(rf"layers\.({later})\.self_attn\.(q|k|v|qkv)_proj\."): None},
        orig_to_new_stacked={  # with both dots, because ".q_proj" alone also begins "q_proj_swiftkv"
            ".q_proj.": (".qkv_proj.", "q"),
            ".k_proj.": (".qkv_proj.", "k"),
            ".v_proj.": (".qkv_proj.", "v"),
            ".k_proj_swiftkv.": (".kv_proj_swiftkv.", "k"),
            ".v_proj_swiftkv.": (".kv_proj_swiftkv.", "v"),
            ".gate_proj.": (".gate_up_proj.", 0),
            ".up_proj.": (".gate_up_proj.", 1),
        },
    )
