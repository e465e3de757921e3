"""`skipped_share` computes how much of a prompt token's work SwiftKV's later layers skip."""

from __future__ import annotations

from typing import Any


def head_size(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def layer_flops(config: Any) -> tuple[float, float]:
    """(FLOPs of all matrices of a layer, FLOPs of its key and value matrices) for a token, see `skipped_share`."""
    width, heads, size = config.hidden_size, config.num_attention_heads, head_size(config)
    inner = getattr(config, "intermediate_size", None) or 4 * width
    kv = 4 * width * (getattr(config, "num_key_value_heads", None) or heads) * size
    return 4 * width * heads * size + kv + 6 * width * inner, kv


def skipped_share(config: Any) -> float:
    """The share of a prompt token's FLOPs that a `llama_swiftkv` model skips; 0 for any other model.

    Per layer, at 2 FLOPs a multiply-add, with d the width, dq = heads x head size, kv = key-value heads x head size and
    ff the width of the MLP:  QO = 4 d dq,  KV = 4 d kv,  MLP = 6 d ff. Of L layers, the first K do all this work for
    each prompt token. Of the later layers, every G-th computes only keys and values (SwiftKV, arXiv:2410.03960):

        skipped = 1 - (K (QO + KV + MLP) + (L - K) KV / G) / (L (QO + KV + MLP))

    The formula leaves out attention, whose skipped share (L - K) / L is a little larger, and the last prompt token,
    which passes all layers.
    """
    if getattr(config, "model_type", None) != "llama_swiftkv" or not config.swiftkv_skip_prefill:
        return 0.0
    layer, kv = layer_flops(config)
    layers, kept = config.num_hidden_layers, config.num_key_value_layers
    return float(1 - (kept * layer + (layers - kept) * kv / config.key_value_group_size) / (layers * layer))
