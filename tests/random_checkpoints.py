"""Random checkpoints for tests and benchmarks: no public SwiftKV checkpoint is small."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from complete_fn_workers.swiftkv.checkpoint import is_teachers, write_tensors
from complete_fn_workers.swiftkv.reference import Llama, LlamaShape, SwiftKV

TINY = LlamaShape(
    vocab_size=512,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=8,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=4096,
)


def config_of(shape: LlamaShape, swiftkv: SwiftKV | None, dtype: str = "float32", **more: Any) -> dict[str, Any]:
    """`config.json` of a Llama or, with `swiftkv`, of a SwiftKV-Llama as Snowflake publishes it."""
    plain = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **asdict(shape),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    if swiftkv is not None:
        plain |= {"architectures": ["LlamaSwiftKVForCausalLM"], "model_type": "llama_swiftkv", "swiftkv": True}
        plain |= asdict(swiftkv)
    return plain | more


def random_model(shape: LlamaShape, swiftkv: SwiftKV | None, seed: int = 0) -> Llama:
    """Random weights whose attention is sharp (scores of standard deviation 3), so that every cached token matters."""
    torch.manual_seed(seed)
    model = Llama(shape, swiftkv, tied=False)
    sharp = (3 / shape.hidden_size) ** 0.5
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1:
                p.uniform_(0.5, 1.5)
            elif "q_proj" in name or "k_proj" in name:
                p.normal_(std=sharp)
            else:
                p.normal_(std=1.0 if "embed" in name else 1.5 * p.shape[1] ** -0.5)
    return model


def write_checkpoint(
    model: Llama, folder: Path, keep_teacher: bool = True, dtype: torch.dtype = torch.float32, **config: Any
) -> Path:
    """Write `model` as a Hugging Face folder without tokenizer; returns the folder.

    `keep_teacher`: the published form, with the q/k/v projections of later layers that only the teacher uses.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kind = str(dtype).removeprefix("torch.")
    settings = config_of(model.shape, model.swiftkv, kind, tie_word_embeddings=model.lm_head is None, **config)
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    tensors = (
        (name if name.startswith("lm_head") else f"model.{name}", p.detach().to(dtype))
        for name, p in model.named_parameters()
        if keep_teacher or model.swiftkv is None or not is_teachers(name, model.swiftkv)
    )
    write_tensors(tensors, folder)
    return folder
