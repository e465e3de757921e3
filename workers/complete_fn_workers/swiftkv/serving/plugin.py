"""The entry point `vllm.general_plugins` registers `llama_swiftkv` checkpoints with transformers and vLLM."""

from __future__ import annotations

ARCHITECTURE = "LlamaSwiftKVForCausalLM"


def register() -> None:
    """Register the config, the model (by name, so that nothing heavy is imported) and its limits. Safe to repeat."""
    from transformers import AutoConfig
    from vllm import ModelRegistry

    from complete_fn_workers.engine.vllm_internals import register_check
    from complete_fn_workers.swiftkv.serving.config import LlamaSwiftKVConfig
    from complete_fn_workers.swiftkv.serving.limits import set_limits

    AutoConfig.register(LlamaSwiftKVConfig.model_type, LlamaSwiftKVConfig, exist_ok=True)
    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, f"complete_fn_workers.swiftkv.serving.model:{ARCHITECTURE}")
    register_check(ARCHITECTURE, set_limits)
