"""Configurations of small models, by their names in config.json."""

from __future__ import annotations

from types import SimpleNamespace

LLAMA = SimpleNamespace(
    model_type="llama",
    hidden_size=64,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=128,
    num_hidden_layers=8,
    vocab_size=1000,
)
SWIFT = SimpleNamespace(
    **{
        **vars(LLAMA),
        "model_type": "llama_swiftkv",
        "swiftkv_skip_prefill": True,
        "num_key_value_layers": 4,
        "key_value_group_size": 1,
    }
)
