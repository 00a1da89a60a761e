"""MLA's weights of a whole KVP group on each of its ranks. Extends `model_runner.py`.

Two projections may have such replicas. That of queries: upstream gathers them after the KV pool is
sized, so their memory is missing from the account; it warns and serves without them where it cannot
gather; and it never renews them when weights are updated. That of values, which upstream has not:
see `models/value_projection.py`. Here both are gathered as soon as the model is loaded, a model
that cannot have them is refused where they were asked for, and `weight_updater` renews them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
from sglang.srt.model_executor.model_runner import _gather_block_fp8_linear, _is_block_fp8
from sglang.srt.models.deepseek_v2 import DeepseekV2AttentionMLA
from sglang.srt.runtime_context import get_parallel

from sglang_helix.srt.compatibility.situation import attn_tp_size_of, replicates_v_proj

logger = logging.getLogger(__name__)

_FULL_PRECISION = (torch.bfloat16, torch.float16, torch.float32)


class ReplicationRefusedError(ValueError):
    """A projection cannot be replicated; the message says why and what to do."""


@dataclass(frozen=True)
class Replica:
    """One projection of a layer, of which a rank may have the weights of the whole group."""

    name: str
    """What the user reads."""
    otherwise: str
    """What a layer does without it."""
    instead: str
    """What to do where it cannot be had."""
    obstacle: Callable[[Any], str | None]
    """Why a layer cannot have it; None where it can."""
    renew: Callable[[Any], None]
    """Gather it from the ranks of the KVP group, all of which call this.

    The first call allocates. Later ones fill the same tensors, whose addresses captured graphs
    hold.
    """
    drop: Callable[[Any], None]
    """Leave a layer without it."""
    parts: Callable[[Any], tuple[tuple[torch.Tensor, torch.Tensor], ...]]
    """Each tensor of it beside the layer's own, heads first; empty where a layer has none."""

    def replicate(self, model: torch.nn.Module, *, required: bool) -> None:
        """Give every MLA layer the weights of its whole KVP group, from its ranks' shards.

        Where a layer allows no replica, raises ReplicationRefusedError if `required`, else leaves
        that layer without.
        """
        for name, layer in layers(model):
            if (reason := self.obstacle(layer)) is None:
                self.renew(layer)
            elif required:
                raise ReplicationRefusedError(self.refusal(name, reason))
            else:
                logger.info("%s %s: %s", name, self.otherwise, reason)

    def refusal(self, name: str, reason: str) -> str:
        """What the user reads about a layer that cannot have the replica that was asked for."""
        return (
            f"the {self.name} projection of {name} cannot be replicated: {reason}. {self.instead}"
        )

    def is_current(self, layer: Any, group: Any) -> bool:
        """Whether this rank's part of a layer's replica is still what this rank holds."""
        return all(
            _same_bytes(whole.chunk(group.world_size)[group.rank_in_group], own)
            for whole, own in self.parts(layer)
        )

    def nbytes(self, model: torch.nn.Module) -> int:
        """Of all layers."""
        return sum(whole.nbytes for _, layer in layers(model) for whole, _ in self.parts(layer))


def layers(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """Every MLA layer that decodes in absorbed form, by name."""
    for name, layer in model.named_modules():
        if isinstance(layer, DeepseekV2AttentionMLA) and layer.w_kc is not None:
            yield name, layer


def wanted(runner: Any) -> Iterator[tuple[Replica, bool]]:
    """The replicas that a runner's layers are to have, and whether each of them must.

    None, where no cache is sharded: a draft model's is whole.
    """
    parallel, args = get_parallel(), runner.server_args
    if not runner.use_mla_backend or runner.is_draft_worker or parallel.attn_dcp_size == 1:
        return
    if parallel.dcp_replicate_q_proj:
        # For some models SGLang turns it on by itself.
        asked = args._raw_input.get("dcp_replicate_q_proj")
        yield QUERIES, bool(asked) or (asked is None and attn_tp_size_of(args) is not None)
    if replicates_v_proj(args):
        yield VALUES, True


def _query_obstacle(layer: Any) -> str | None:
    projection = _projection(layer)
    plain = isinstance(projection.quant_method, UnquantizedLinearMethod)
    if layer.w_kc.dtype in _FULL_PRECISION and (plain or _is_block_fp8(projection)):
        return None
    return (
        f"it is quantized by {type(projection.quant_method).__name__}, with {layer.w_kc.dtype} "
        "absorbed weights"
    )


def _renew_queries(layer: Any) -> None:
    group, projection = get_parallel().dcp_group, _projection(layer)
    if isinstance(projection.quant_method, UnquantizedLinearMethod):
        weight = group.all_gather(projection.weight.data, dim=0)
        layer.q_b_proj_qrep_weight = _renewed(layer.q_b_proj_qrep_weight, weight)
    else:
        replica = _gather_block_fp8_linear(projection, group)
        if layer.q_b_proj_qrep is None:
            layer.q_b_proj_qrep = replica
        else:
            layer.q_b_proj_qrep.load_state_dict(replica.state_dict())
    layer.w_kc_qrep = _renewed(layer.w_kc_qrep, group.all_gather(layer.w_kc.contiguous(), dim=0))


def _drop_queries(layer: Any) -> None:
    layer.w_kc_qrep = layer.q_b_proj_qrep_weight = layer.q_b_proj_qrep = None


def _query_parts(layer: Any) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
    if layer.w_kc_qrep is None:
        return ()
    replica = layer.q_b_proj_qrep_weight
    if replica is None:
        replica = layer.q_b_proj_qrep.weight
    return (replica, _projection(layer).weight), (layer.w_kc_qrep, layer.w_kc)


QUERIES = Replica(
    "query",
    "gathers its queries",
    "Give --no-dcp-replicate-q-proj, with which queries are gathered, in place of "
    "--dcp-replicate-q-proj or beside --attn-tp-size.",
    _query_obstacle,
    _renew_queries,
    _drop_queries,
    _query_parts,
)


def _value_obstacle(layer: Any) -> str | None:
    if layer.w_vc.dtype not in _FULL_PRECISION or layer.use_deep_gemm_bmm:
        return f"it has {layer.w_vc.dtype} absorbed weights, whose product the model scales"
    if getattr(layer, "_kimi_split_gguf_kv_b", False):
        return "its weights are in GGUF's blocks"
    if layer.use_dsa or layer.next_skip_topk is not None:
        return "its attention is sparse"
    if getattr(layer, "learnable_sink_param", None) is not None:
        return "its attention has sinks"
    return None


def _renew_values(layer: Any) -> None:
    # In memory the latent is the last dimension, of the layer's own too.
    own = layer.w_vc.transpose(1, 2).contiguous()
    whole = get_parallel().dcp_group.all_gather(own, dim=0).transpose(1, 2)
    layer.w_vc_rep = _renewed(getattr(layer, "w_vc_rep", None), whole)


def _drop_values(layer: Any) -> None:
    layer.w_vc_rep = None


def _value_parts(layer: Any) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
    whole = getattr(layer, "w_vc_rep", None)
    return () if whole is None else ((whole, layer.w_vc),)


VALUES = Replica(
    "value",
    "projects its values behind the exchange",
    "Leave --dcp-replicate-v-proj out: values are then projected behind the exchange.",
    _value_obstacle,
    _renew_values,
    _drop_values,
    _value_parts,
)


def _projection(layer: Any) -> Any:
    return layer.q_b_proj if layer.has_q_b_proj else layer.q_proj


def _renewed(old: torch.Tensor | None, new: torch.Tensor) -> torch.Tensor:
    return new if old is None else old.copy_(new)


def _same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
