"""What SwiftKV's later layers skip of a prompt token's work."""

from __future__ import annotations

from typing import Any


def head_size(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def layer_flops(config: Any) -> tuple[float, float]:
    """(FLOPs of all matrices of a layer for a token, those of its keys and values), as `skipped_share` counts them."""
    width, heads, size = config.hidden_size, config.num_attention_heads, head_size(config)
    inner = getattr(config, "intermediate_size", None) or 4 * width
    kv = 4 * width * (getattr(config, "num_key_value_heads", None) or heads) * size
    return 4 * width * heads * size + kv + 6 * width * inner, kv


def skipped_share(config: Any) -> float:
    """Share of a prompt token's FLOPs that a `llama_swiftkv` model skips; 0 for any other model.

    Per layer, at 2 FLOPs a multiply-add, with d the width, dq = heads x head size, kv = key-value heads x head size and
    ff the width of the MLP:  QO = 4 d dq,  KV = 4 d kv,  MLP = 6 d ff. Of L layers, the K first do all of it for each
    prompt token; of the later ones every G-th only computes keys and values (SwiftKV, arXiv:2410.03960):

        skipped = 1 - (K (QO + KV + MLP) + (L - K) KV / G) / (L (QO + KV + MLP))

    Left out are attention itself, whose skipped share is (L - K) / L, a little more, and the last prompt token, which
    passes all layers.
    """
    if getattr(config, "model_type", None) != "llama_swiftkv" or not config.swiftkv_skip_prefill:
        return 0.0
    layer, kv = layer_flops(config)
    layers, kept = config.num_hidden_layers, config.num_key_value_layers
    return float(1 - (kept * layer + (layers - kept) * kv / config.key_value_group_size) / (layers * layer))
