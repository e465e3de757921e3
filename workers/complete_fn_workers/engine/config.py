"""Turns an engine's spec into vLLM's configuration: our defaults, then the catalogue's engine_args, memory bounded."""

from __future__ import annotations

import dataclasses
from typing import Any

from vllm import EngineArgs
from vllm.config import VllmConfig
from vllm.platforms import CpuArchEnum, current_platform
from vllm.plugins import load_general_plugins

from complete_fn.errors import did_you_mean
from complete_fn_workers.engine.machine import GIB, computes_bfloat16, memory_bytes
from complete_fn_workers.engine.vllm_internals import (
    add_seats,
    checkpoint_config,
    create_config,
    full_cache_bytes,
    set_cache_bytes,
)

LOAD_FORMATS = ("safetensors", "dummy")
INTERACTIVE_SEATS = 4
OURS = ("model", "tokenizer", "revision", "trust_remote_code", "disable_log_stats")


class ConfigurationError(Exception):
    """The engine_args cannot be used."""


def vllm_config(spec: dict[str, Any]) -> VllmConfig:
    """The configuration with which the engine starts.

    Raises:
        ConfigurationError: An engine_arg is unknown, or would load code or pickles.
    """
    own = dict(spec["engine_args"])
    check_engine_args(own)
    defaults: dict[str, Any] = {
        "max_model_len": spec["max_model_len"] or -1,  # -1: as much of the model's context as the KV cache holds
        "load_format": "safetensors",
        "enable_prefix_caching": True,
        # vLLM takes one backend for all rows; this one compiles a schema fastest and knows the most keywords.
        "structured_outputs_config": {"backend": "guidance", "disable_additional_properties": True},
        "seed": 0,
        "scheduling_policy": "priority",  # first come, first served among rows of one lane
    }
    if current_platform.is_cpu():
        # With the CPU default, blocks of 128 tokens, the prefix cache never holds a 100-token instruction. Compiling
        # costs 50 s at start.
        defaults |= {"block_size": 32, "enforce_eager": True, "dtype": cpu_dtype(spec)}
    fixed = {
        "model": spec["checkpoint"],
        "revision": spec["revision"],
        "tokenizer_revision": spec["revision"],
        "trust_remote_code": False,
        "disable_log_stats": True,
    }
    config = create_config({**defaults, **own, **fixed})
    bound_memory(config, own, spec["kv_cache_gib"])
    # Chats get their own seats, so that they need not wait until a bulk row ends.
    add_seats(config, INTERACTIVE_SEATS)
    return config


def cpu_dtype(spec: dict[str, Any]) -> str:
    """float32 for a half-precision checkpoint on an x86 CPU that would compute it in float32 anyway, value by value.

    There float32 is several times faster (benchmarks/figures.md). Quantised models keep their type, and so do models
    whose weights in float32 would take more than a third of memory.
    """
    if current_platform.get_cpu_architecture() != CpuArchEnum.X86 or computes_bfloat16():
        return "auto"
    load_general_plugins()  # registers SwiftKV's configuration
    config = checkpoint_config(spec["checkpoint"], spec["revision"])
    try:
        weights = 4 * most_weights(config.get_text_config())
    except (AttributeError, TypeError):  # its dimensions are not a decoder's
        return "auto"
    quantised = getattr(config, "quantization_config", None) is not None
    return "auto" if quantised or weights > memory_bytes() / 3 else "float32"


def most_weights(config: Any) -> int:
    """A bound on a decoder's parameters from its configuration's dimensions."""
    width, vocabulary = int(config.hidden_size), int(config.vocab_size)
    experts = int(getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 1)
    mlp = 3 * width * int(getattr(config, "intermediate_size", None) or 4 * width) * experts
    return int(config.num_hidden_layers) * (4 * width * width + mlp) + 2 * vocabulary * width


def check_engine_args(own: dict[str, Any]) -> None:
    known = {field.name for field in dataclasses.fields(EngineArgs)}
    for name, value in own.items():
        if name in OURS and value is not False:
            raise ConfigurationError(f"engine_args.{name} cannot be set: the model's entry has it, or it is refused.")
        if name not in known:
            raise ConfigurationError(f"engine_args has no {name!r}.{did_you_mean(name, known)}")
    load_format = own.get("load_format", "safetensors")
    if load_format not in LOAD_FORMATS:
        raise ConfigurationError(f"engine_args.load_format {load_format!r} is not one of {', '.join(LOAD_FORMATS)}.")


def bound_memory(config: VllmConfig, own: dict[str, Any], limit_gib: float | None) -> None:
    """Set the size of the KV cache: the user's, else on a CPU a tenth of RAM (1 to 8 GiB), at most what rows can fill.

    On a GPU vLLM fills the memory (gpu_memory_utilization), unless the user sets a size.
    """
    if "kv_cache_memory_bytes" in own or "gpu_memory_utilization" in own:
        return
    if limit_gib is not None:
        set_cache_bytes(config, int(limit_gib * GIB))
    elif current_platform.is_cpu():
        share = min(8 * GIB, max(GIB, memory_bytes() // 10))
        set_cache_bytes(config, min(share, full_cache_bytes(config)))
