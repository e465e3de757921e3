"""The share of a prompt's FLOPs that SwiftKV skips."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from complete_fn.capacity.flops import skipped_share


def test_the_skipped_share_is_that_of_the_published_table() -> None:
    """Llama 3.1 8B, K = L/2: 3.85 % of a layer's FLOPs are keys and values."""
    shape = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
    layers = {"num_hidden_layers": 32, "num_key_value_layers": 16, "head_dim": 128}
    of = {"model_type": "llama_swiftkv", "swiftkv_skip_prefill": True}
    single = SimpleNamespace(**shape, **layers, **of, key_value_group_size=1)
    across = SimpleNamespace(**shape, **layers, **of, key_value_group_size=4)
    assert skipped_share(single) == pytest.approx(0.5 * (1 - 0.0385), abs=1e-4)
    assert skipped_share(across) == pytest.approx(0.5 * (1 - 0.0385 / 4), abs=1e-4)
    assert skipped_share(SimpleNamespace(model_type="llama")) == 0.0
    single.swiftkv_skip_prefill = False
    assert skipped_share(single) == 0.0
