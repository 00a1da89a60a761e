"""Ring-2.5 and Ling-2.5 in torch: a class that ``transformers`` lacks, on parts that it has.

Latent attention is its DeepSeek-V3's. The rest follows the published configuration: lightning
attention between, whose every head forgets at a pace of its own, and experts chosen by groups.
How fast a layer's heads forget is counted as SGLang's and vLLM's plain tensor parallelism do; the
modelling file beside the weights has each layer one earlier.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3Attention,
    DeepseekV3MLP,
    DeepseekV3RMSNorm,
    apply_rotary_pos_emb,
)


class BailingMoeV2_5Config(PreTrainedConfig):  # noqa: N801 as published
    """The published names, all given."""

    model_type = "bailing_hybrid"
    has_no_defaults_at_init = True
    attention_bias = False
    attention_dropout = 0.0
    hidden_act = "silu"

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self.rope_parameters = {"rope_type": "default", "rope_theta": given["rope_theta"]}


class _States(DynamicCache):
    """The latents of full layers, and by layer the state [1, H, K, V] that others keep."""

    def __init__(self) -> None:
        super().__init__()
        self.read = 0
        self.by_layer: dict[int, Tensor] = {}


def _rotations(positions: Tensor, width: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines [1, T, width], both halves alike."""
    pace = theta ** (-torch.arange(0, width, 2).float() / width)
    angles = (positions[:, None] * pace).repeat(1, 2)[None]
    return angles.cos(), angles.sin()


class _Lightning(nn.Module):
    def __init__(self, config: Any, layer: int) -> None:
        super().__init__()
        self.layer, self.heads, self.width = layer, config.num_attention_heads, config.head_dim
        self.groups, self.theta = config.group_norm_size, config.rope_theta
        self.rotated = int(self.width * config.partial_rotary_factor)
        inner, eps = self.heads * self.width, config.rms_norm_eps
        self.query_key_value = nn.Linear(config.hidden_size, 3 * inner, bias=False)
        self.query_layernorm = DeepseekV3RMSNorm(self.width, eps=eps)
        self.key_layernorm = DeepseekV3RMSNorm(self.width, eps=eps)
        self.g_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.g_norm = DeepseekV3RMSNorm(inner, eps=eps)
        self.dense = nn.Linear(inner, config.hidden_size, bias=False)
        # The first layer forgets fastest.
        self.share = 1 - layer / (config.num_hidden_layers - 1) + 1e-5

    def forward(self, x: Tensor, positions: Tensor, kept: Tensor, cache: _States) -> Tensor:
        shape = (*x.shape[:2], self.heads, self.width)
        q, k, v = (part.view(shape) for part in self.query_key_value(x).chunk(3, dim=-1))
        q, k, v = (
            part.transpose(1, 2) for part in (self.query_layernorm(q), self.key_layernorm(k), v)
        )
        cos, sin = _rotations(positions, self.rotated, self.theta)
        turned = apply_rotary_pos_emb(q[..., : self.rotated], k[..., : self.rotated], cos, sin)
        q, k = (
            torch.cat([part, whole[..., self.rotated :]], dim=-1)
            for part, whole in zip(turned, (q, k), strict=True)
        )
        k = k * kept[positions, None]
        steps = torch.arange(1.0, x.shape[1] + 1)
        # Of a power of two heads.
        pace = self.share * 2 ** (-8 / self.heads * torch.arange(1, self.heads + 1))[:, None, None]
        # What is left at a token of an earlier one; of the state; and at the end of each token.
        age = steps[:, None] - steps
        left = torch.where(age >= 0, (-pace * age).exp(), 0.0)
        state = cache.by_layer.get(self.layer, x.new_zeros(1, self.heads, self.width, self.width))
        out = ((q @ k.mT) * left) @ v + (-pace * steps[:, None]).exp() * (q @ state)
        to_the_end = (-pace * (steps[-1] - steps)[:, None]).exp()
        cache.by_layer[self.layer] = (-pace * steps[-1]).exp() * state + (k * to_the_end).mT @ v
        out = (out * self.width**-0.5).transpose(1, 2).reshape(*x.shape[:2], self.groups, -1)
        out = out * torch.rsqrt(out.square().mean(-1, keepdim=True) + self.g_norm.variance_epsilon)
        return self.dense(out.flatten(2) * self.g_norm.weight * self.g_proj(x).sigmoid())


class _Gate(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.expert_bias = nn.Parameter(torch.empty(config.num_experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Experts of each token and their weights, both [T, k]."""
        config, scores = self.config, functional.linear(x, self.weight).sigmoid()
        by_group = (scores + self.expert_bias).unflatten(-1, (config.n_group, -1))
        best = by_group.topk(2).values.sum(-1).topk(config.topk_group).indices
        kept = torch.zeros(by_group.shape[:-1], dtype=torch.bool).scatter(-1, best, True)
        open_to = by_group.where(kept[..., None], -torch.inf).flatten(-2)
        chosen = open_to.topk(config.num_experts_per_tok).indices
        weights = scores.gather(-1, chosen)
        return chosen, weights / weights.sum(-1, keepdim=True) * config.routed_scaling_factor


class _Experts(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        width = config.moe_intermediate_size
        self.gate = _Gate(config)
        self.experts = nn.ModuleList(
            DeepseekV3MLP(config, width) for _ in range(config.num_experts)
        )
        self.shared_experts = DeepseekV3MLP(config, width * config.num_shared_experts)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        chosen, weights = self.gate(tokens)
        out = self.shared_experts(tokens)
        for number, expert in enumerate(self.experts):
            token, place = (chosen == number).nonzero(as_tuple=True)
            if len(token):
                out = out.index_add(0, token, expert(tokens[token]) * weights[token, place, None])
        return out.view_as(x)


class _Layer(nn.Module):
    def __init__(self, config: Any, layer: int) -> None:
        super().__init__()
        self.full = (layer + 1) % config.layer_group_size == 0
        self.rotated, self.theta = config.qk_rope_head_dim, config.rope_theta
        self.attention = (
            DeepseekV3Attention(config, layer) if self.full else _Lightning(config, layer)
        )
        sparse = layer >= config.first_k_dense_replace
        self.mlp = _Experts(config) if sparse else DeepseekV3MLP(config)
        self.input_layernorm = DeepseekV3RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = DeepseekV3RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, positions: Tensor, kept: Tensor, cache: _States) -> Tensor:
        normed = self.input_layernorm(x)
        if self.full:
            turns = _rotations(positions, self.rotated, self.theta)
            unseen = (torch.arange(len(kept)) > positions[:, None]) | ~kept
            lowest = torch.finfo(x.dtype).min  # a token that sees none has no softmax of infinities
            mask = torch.zeros(unseen.shape).masked_fill(unseen, lowest)[None, None]
            x = x + self.attention(normed, turns, mask, cache)[0]
        else:
            x = x + self.attention(normed, positions, kept, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class _Model(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            _Layer(config, layer) for layer in range(config.num_hidden_layers)
        )
        self.norm = DeepseekV3RMSNorm(config.hidden_size, config.rms_norm_eps)


class BailingMoeV2_5ForCausalLM(PreTrainedModel):  # noqa: N801 as published
    """One prompt at a time, without padding; used as any of transformers' causal models."""

    config_class = BailingMoeV2_5Config

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = _Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        past_key_values: _States | None = None,
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [1, T, vocabulary] of the tokens [1, T] behind those that were read before.

        attention_mask: [1, tokens read and these]; 0 for those that nothing looks at.
        """
        cache = _States() if past_key_values is None else past_key_values
        read = cache.read + input_ids.shape[1]
        positions = torch.arange(cache.read, read)
        kept = torch.ones(read) if attention_mask is None else attention_mask[0]
        x = self.model.word_embeddings(input_ids)
        for layer in self.model.layers:
            x = layer(x, positions, kept.bool(), cache)
        cache.read = read
        return CausalLMOutputWithPast(
            logits=self.lm_head(self.model.norm(x)), past_key_values=cache
        )
