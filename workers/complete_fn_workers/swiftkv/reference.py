"""Llama and its SwiftKV form in plain PyTorch, with tensor names as in Hugging Face checkpoints.

This reference model trains the demonstration model, distils SwiftKV students, and is the oracle for vLLM's answers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's stretched rotary frequencies, by their config names."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class LlamaShape:
    """Sizes by their Hugging Face config names."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 4096


@dataclass(frozen=True)
class SwiftKV:
    """The first `num_key_value_layers` (K) layers are plain. `key_value_group_size` (G) later ones share a cache."""

    num_key_value_layers: int
    key_value_group_size: int = 1

    def is_owner(self, layer: int) -> bool:
        later = layer - self.num_key_value_layers
        return later >= 0 and later % self.key_value_group_size == 0


def rope_table(shape: LlamaShape, length: int, scaling: RopeScaling | None = None) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotary angles of arXiv 2104.09864, each [length, head_dim]. Halves are rotated as in Llama."""
    half = torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim
    frequencies = shape.rope_theta**-half
    if scaling is not None:
        frequencies = stretched(frequencies, scaling)
    angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def stretched(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3.1's rule: slow frequencies are divided by `factor`, fast ones kept, and those between blended linearly.

    The blend is linear in the turns that a frequency makes over the original context.
    """
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    share = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    share = share.clamp(0, 1)
    return (1 - share) * frequencies / scaling.factor + share * frequencies


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention; arguments and result are [batch, heads, length, head_dim].

    Up to 1,024 tokens (256 if compiled) it is written as matrix products, which are faster there than the CPU kernel.
    Outside of a compiled model scores have the inputs' own type: for bfloat16 two to three times as fast.
    """
    length = q.shape[2]
    if torch.compiler.is_compiling():
        return attend_compiled(q, k, v)
    if length > 1024:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    later = torch.full((length, length), -1e30, dtype=q.dtype, device=q.device).triu(1)
    flat_q, flat_k, flat_v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    masks = later.expand(len(flat_q), length, length)
    scores = torch.baddbmm(masks, flat_q, flat_k.transpose(1, 2), alpha=q.shape[-1] ** -0.5)
    return (scores.softmax(-1) @ flat_v).view_as(q)


def attend_compiled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    length = q.shape[2]
    if length > 256:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    later = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
    scores = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
    weights: Tensor = scores.masked_fill(later, -1e30).softmax(-1).to(q.dtype)
    return weights @ v


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normal = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        out: Tensor = normal.to(x.dtype) * self.weight.to(x.dtype)
        return out


class Rotary(NamedTuple):
    cos: Tensor
    sin: Tensor


class Attention(nn.Module):
    def __init__(self, s: LlamaShape) -> None:
        super().__init__()
        self.shape = s
        self.q_proj = nn.Linear(s.hidden_size, s.num_attention_heads * s.head_dim, bias=False)
        self.k_proj = nn.Linear(s.hidden_size, s.num_key_value_heads * s.head_dim, bias=False)
        self.v_proj = nn.Linear(s.hidden_size, s.num_key_value_heads * s.head_dim, bias=False)
        self.o_proj = nn.Linear(s.num_attention_heads * s.head_dim, s.hidden_size, bias=False)

    def heads(self, flat: Tensor) -> Tensor:
        """[batch, length, heads * head_dim] -> [batch, heads, length, head_dim]"""
        return flat.view(*flat.shape[:2], -1, self.shape.head_dim).transpose(1, 2)

    def spread(self, kv: Tensor) -> Tensor:
        """One copy of each key or value head per query head that reads it."""
        return kv.repeat_interleave(self.shape.num_attention_heads // self.shape.num_key_value_heads, dim=1)

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mixed: Tensor = self.o_proj(attend(q, k, v).transpose(1, 2).flatten(2))
        return mixed

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q = rotate(self.heads(self.q_proj(x)), cos, sin)
        k = rotate(self.heads(self.k_proj(x)), cos, sin)
        return self.mixed(q, self.spread(k), self.spread(self.heads(self.v_proj(x))))


class SwiftKVAttention(Attention):
    """The teacher's projections beside the student's `*_proj_swiftkv`. Only a group's owner has keys and values."""

    def __init__(self, s: LlamaShape, owner: bool) -> None:
        super().__init__(s)
        self.owner = owner
        self.q_proj_swiftkv = nn.Linear(s.hidden_size, s.num_attention_heads * s.head_dim, bias=False)
        if owner:
            self.k_proj_swiftkv = nn.Linear(s.hidden_size, s.num_key_value_heads * s.head_dim, bias=False)
            self.v_proj_swiftkv = nn.Linear(s.hidden_size, s.num_key_value_heads * s.head_dim, bias=False)

    def cache(self, x: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        """Keys and values, each [batch, num_key_value_heads, length, head_dim]."""
        return rotate(self.heads(self.k_proj_swiftkv(x)), *rotary), self.heads(self.v_proj_swiftkv(x))

    def student(self, x: Tensor, cache: tuple[Tensor, Tensor], rotary: Rotary) -> Tensor:
        k, v = cache
        return self.mixed(rotate(self.heads(self.q_proj_swiftkv(x)), *rotary), self.spread(k), self.spread(v))

    def student_at(self, x: Tensor, cache: tuple[Tensor, Tensor], rotary: Rotary, at: Tensor) -> Tensor:
        """As `student`, but only for the tokens at positions `at` [batch, a], whose inputs are x [batch, a, size]."""
        q = rotate(self.heads(self.q_proj_swiftkv(x)), rotary.cos[at][:, None], rotary.sin[at][:, None])
        k, v = cache
        seen = at[:, None, None, :, None] >= torch.arange(k.shape[2], device=at.device)
        batch, heads, count, size = q.shape
        of_group = q.reshape(batch, k.shape[1], -1, size)  # cheaper than a copy of keys and values per query head
        scores = (of_group @ k.transpose(-1, -2)).view(batch, k.shape[1], heads // k.shape[1], count, -1)
        weights = (scores * size**-0.5).masked_fill(~seen, -1e30).softmax(-1)
        mixed = (weights.flatten(2, 3) @ v).view(q.shape)
        out: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return out


class MLP(nn.Module):
    def __init__(self, s: LlamaShape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(s.hidden_size, s.intermediate_size, bias=False)
        self.up_proj = nn.Linear(s.hidden_size, s.intermediate_size, bias=False)
        self.down_proj = nn.Linear(s.intermediate_size, s.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    def __init__(self, s: LlamaShape, attention: Attention | None = None) -> None:
        super().__init__()
        self.self_attn = attention if attention is not None else Attention(s)
        self.mlp = MLP(s)
        self.input_layernorm = RMSNorm(s.hidden_size, s.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(s.hidden_size, s.rms_norm_eps)

    def forward(self, h: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return self.fed_forward(h + self.self_attn(self.input_layernorm(h), cos, sin))

    def fed_forward(self, h: Tensor) -> Tensor:
        out: Tensor = h + self.mlp(self.post_attention_layernorm(h))
        return out


class States(NamedTuple):
    """`last`: after the final norm; `before_last`: before the last layer. Each is [batch, length, hidden_size]."""

    last: Tensor
    before_last: Tensor


class Llama(nn.Module):
    """A decoder. `forward` gives the last hidden states, `logits` the scores of chosen rows.

    With `swiftkv` it is teacher and student at once: `forward` is the teacher, `student` the SwiftKV form.
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self, shape: LlamaShape, swiftkv: SwiftKV | None = None, tied: bool = True, scaling: RopeScaling | None = None
    ) -> None:
        super().__init__()
        self.shape, self.swiftkv = shape, swiftkv
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(self.layer(i) for i in range(shape.num_hidden_layers))
        self.norm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        if swiftkv is not None:
            self.norm_swiftkv = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.lm_head = None if tied else nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)
        cos, sin = rope_table(shape, shape.max_position_embeddings, scaling)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def layer(self, i: int) -> Layer:
        if self.swiftkv is None or i < self.swiftkv.num_key_value_layers:
            return Layer(self.shape)
        return Layer(self.shape, SwiftKVAttention(self.shape, self.swiftkv.is_owner(i)))

    def embedded(self, tokens: Tensor) -> tuple[Tensor, Rotary]:
        h: Tensor = self.embed_tokens(tokens)
        if torch.is_autocast_enabled("cpu"):
            h = h.to(torch.bfloat16)
        return h, self.rotary(h)

    def rotary(self, h: Tensor) -> Rotary:
        """The rotary table for the positions of h [batch, length, hidden_size], in its type."""
        return Rotary(self.cos[: h.shape[1]].to(h.dtype), self.sin[: h.shape[1]].to(h.dtype))

    def forward(self, tokens: Tensor) -> Tensor:
        """The hidden states [batch, length, hidden_size] of token ids [batch, length], after the final norm."""
        h, rotary = self.embedded(tokens)
        for layer in self.layers:
            h = layer(h, *rotary)
        last: Tensor = self.norm(h)
        return last

    def early(self, tokens: Tensor) -> tuple[Tensor, Rotary]:
        """The residual stream after layer K - 1, from the layers that teacher and student have in common."""
        h, rotary = self.embedded(tokens)
        for layer in list(self.layers)[: self.kept_layers]:
            h = layer(h, *rotary)
        return h, rotary

    def teacher_late(self, h: Tensor, rotary: Rotary) -> States:
        before = h
        for layer in self.late_layers:
            before, h = h, layer(h, *rotary)
        return States(self.norm(h), before)

    def student_late(self, h: Tensor, rotary: Rotary, at: Tensor | None = None) -> States:
        """The student's states at all positions, or only at `at` [batch, a], as a served model computes them.

        With `at`, other tokens pass no later layer: only keys and values are made of their `h`.
        """
        x = self.norm_swiftkv(h)
        if at is not None:
            h = torch.gather(h, 1, at[..., None].expand(-1, -1, h.shape[-1]))
        before = h
        cache: tuple[Tensor, Tensor] | None = None
        for layer, attention in zip(self.late_layers, self.late_attentions, strict=True):
            if attention.owner:
                cache = attention.cache(x, rotary)
            assert cache is not None
            before = h
            own = layer.input_layernorm(h)
            mixed = (
                attention.student(own, cache, rotary) if at is None else attention.student_at(own, cache, rotary, at)
            )
            h = layer.fed_forward(h + mixed)
        return States(self.norm(h), before)

    def student(self, tokens: Tensor) -> Tensor:
        """As `forward`, in the SwiftKV form: later layers read keys and values that are made of one hidden state."""
        return self.student_late(*self.early(tokens)).last

    @property
    def kept_layers(self) -> int:
        return self.shape.num_hidden_layers if self.swiftkv is None else self.swiftkv.num_key_value_layers

    @property
    def late_layers(self) -> list[Layer]:
        return cast(list[Layer], list(self.layers)[self.kept_layers :])

    @property
    def late_attentions(self) -> list[SwiftKVAttention]:
        return [cast(SwiftKVAttention, layer.self_attn) for layer in self.late_layers]

    def logits(self, hidden: Tensor) -> Tensor:
        weight = self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight
        return F.linear(hidden, weight.to(hidden.dtype))

    def initialise_student(self) -> None:
        """Set the published start: layer K's norm, the teacher's queries, and group means of its keys and values."""
        swiftkv = self.swiftkv
        assert swiftkv is not None
        attentions, size = self.late_attentions, swiftkv.key_value_group_size
        with torch.no_grad():
            self.norm_swiftkv.weight.copy_(self.late_layers[0].input_layernorm.weight)
            for i, own in enumerate(attentions):
                own.q_proj_swiftkv.weight.copy_(own.q_proj.weight)
                if own.owner:
                    group = attentions[i : i + size]
                    own.k_proj_swiftkv.weight.copy_(group_mean(member.k_proj.weight for member in group))
                    own.v_proj_swiftkv.weight.copy_(group_mean(member.v_proj.weight for member in group))


def group_mean(weights: Iterable[Tensor]) -> Tensor:
    """The mean, computed in float32 and returned in the weights' own type. A single weight is returned unchanged."""
    members = list(weights)
    if len(members) == 1:
        return members[0]
    return torch.stack([w.float() for w in members]).mean(0).to(members[0].dtype)
