"""The configuration `llama_swiftkv` has Llama's fields and the three of the published SwiftKV checkpoints."""

from __future__ import annotations

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig


@strict
class LlamaSwiftKVConfig(LlamaConfig):  # type: ignore[misc]
    """A Llama whose layers from `num_key_value_layers` on take keys and values from one shared hidden state.

    Attributes:
        key_value_group_size: consecutive later layers that share one layer's cache (AcrossKV); 1: each has its own.
        swiftkv_skip_prefill: our own field, never in a checkpoint but set by `hf_overrides`. False runs every layer on
            every token, which gives right `prompt_logprobs` at the cost of plain Llama's prefill.

    Raises:
        ValueError: `swiftkv` is false, or the layer counts do not fit together.
    """

    model_type = "llama_swiftkv"

    swiftkv: bool = True
    num_key_value_layers: int = 0
    key_value_group_size: int = 1
    swiftkv_skip_prefill: bool = True

    def __post_init__(self, **kwargs: object) -> None:
        super().__post_init__(**kwargs)
        self.num_key_value_layers = self.num_key_value_layers or self.num_hidden_layers

    def validate_architecture(self) -> None:
        super().validate_architecture()
        if not self.swiftkv:
            raise ValueError(
                "The checkpoint's config has `swiftkv: false`: it is in training form. Export it with "
                "`swiftkv: true`, or serve its parent as a plain Llama."
            )
        kept, layers, group = self.num_key_value_layers, self.num_hidden_layers, self.key_value_group_size
        if not 1 <= kept <= layers:  # equal only in the default object, which transformers builds to compare with
            raise ValueError(f"num_key_value_layers is {kept}; it must lie in 1..{layers - 1}.")
        if group < 1 or (layers - kept) % group:
            raise ValueError(
                f"key_value_group_size is {group}; it must divide the {layers - kept} layers that take shared keys "
                "and values."
            )

    def cache_owner(self, layer: int) -> int:
        """The layer whose cache `layer` (at or after `num_key_value_layers`) reads: the first of its group."""
        return layer - (layer - self.num_key_value_layers) % self.key_value_group_size
