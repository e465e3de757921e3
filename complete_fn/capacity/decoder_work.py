"""`DecoderWork` computes the FLOPs of a decoder's tokens, and the bytes that they read, from its configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from complete_fn.capacity.flops import head_size, layer_flops, skipped_share


@dataclass(frozen=True)
class DecoderWork:
    """The work of a decoder for one token, at 2 FLOPs a multiply-add.

    With d the width, dq = heads x head size, kv = key-value heads x head size, ff the MLP's width, and V words, a layer
    takes QO = 4 d dq, KV = 4 d kv, MLP = 6 d ff, attention 4 dq for each token before; lm_head takes 2 d V. Prompt
    tokens skip a share of this with SwiftKV (`flops.skipped_share`). A mixture of experts counts as a dense model of
    the width that its configuration states.

    Attributes:
        prompt, output: FLOPs of the matrices for a token of the prompt, and of the answer (with lm_head).
        attend_prompt, attend_output: FLOPs of attention for each token before it.
        kv: bytes read for each context token of a decoded token.
        weights: bytes of the matrices, which every step reads.
    """

    prompt: float
    output: float
    attend_prompt: float
    attend_output: float
    kv: float
    weights: float

    @classmethod
    def of(cls, config: Any, item: int = 2, kv_item: int = 2) -> DecoderWork:
        """The work by the configuration. For a model that is no decoder of equal layers, each token counts as 1 FLOP.

        Args:
            config: the text model's configuration in transformers.
            item, kv_item: bytes of a weight, and of a number in the KV cache.
        """
        try:
            return cls.of_layers(config, item, kv_item)
        except (AttributeError, TypeError, ZeroDivisionError):
            return cls(1.0, 1.0, 0.0, 0.0, 0.0, 0.0)

    @classmethod
    def of_layers(cls, config: Any, item: int, kv_item: int) -> DecoderWork:
        """Raises:
        AttributeError, TypeError, ZeroDivisionError: The configuration lacks heads, or one width for all layers.
        """
        layer, kv = layer_flops(config)
        width, heads, layers = config.hidden_size, config.num_attention_heads, config.num_hidden_layers
        matrices, words = layers * layer, 2 * width * config.vocab_size
        attend, skipped = 4 * heads * head_size(config), skipped_share(config)
        attending = config.num_key_value_layers if skipped else layers
        return cls(
            prompt=matrices * (1 - skipped),
            output=matrices + words,
            attend_prompt=attend * attending,
            attend_output=attend * layers,
            kv=kv / (2 * width) * layers * kv_item,
            weights=(matrices + words) / 2 * item,
        )

    def work(self, before: int, now: int, prompt_tokens: int) -> tuple[float, float]:
        """(FLOPs, bytes read from the KV cache) of a row's tokens from the `before`-th to the `now`-th."""
        ahead = max(0, min(now, prompt_tokens) - before)
        written = now - before - ahead
        flops = ahead * self.prompt + self.attend_prompt * (ahead * before + ahead * (ahead + 1) / 2)
        if before < prompt_tokens <= now:  # the prompt's last token passes all layers and gives the first output token
            flops += self.output - self.prompt
        flops += written * (self.output + self.attend_output * now)
        return flops, written * now * self.kv
