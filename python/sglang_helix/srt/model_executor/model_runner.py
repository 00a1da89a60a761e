"""What a rank prepares between its model and its pool. Extends `model_executor/model_runner.py`.

Replicated query projection of MLA, strict: upstream gathers the full-head query weights after the
KV pool is sized, so their memory is missing from the account; it warns and serves without them
where it cannot gather; and it never renews them when weights are updated. Here they are gathered as
soon as the model is loaded, a model that cannot have them is refused where they were asked for, and
every weight update gathers them again in place.

Symmetric memory of the `symm` exchange: as soon as the model is there, its heads, widths and dtype
are known; every rank is at this point at the same time; and the pool is sized by what is left.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.model_executor.model_runner import _gather_block_fp8_linear, _is_block_fp8
from sglang.srt.models.deepseek_v2 import DeepseekV2AttentionMLA
from sglang.srt.runtime_context import get_device, get_exec, get_parallel, get_schedule

from sglang_helix.srt.distributed.topology import Layout
from sglang_helix.srt.layers.dcp.exchange import BACKENDS, note_layer
from sglang_helix.srt.server_args import attn_tp_size_of

logger = logging.getLogger(__name__)

_FULL_PRECISION = (torch.bfloat16, torch.float16, torch.float32)


class ReplicationRefusedError(ValueError):
    """The query projection cannot be replicated; the message says why and what to do."""


def load_model(result: None, runner: Any) -> None:
    """After the weights are loaded and before the pool is sized: gather the replicas."""
    parallel = get_parallel()
    if parallel.dcp_replicate_q_proj and runner.use_mla_backend:
        replicate_q_proj(runner.model, required=_asked_for(runner.server_args))


def prepare_exchange(result: None, runner: Any) -> None:
    """After the weights are loaded and before the pool is sized: what the exchange needs."""
    parallel, config = get_parallel(), runner.model_config
    backend = BACKENDS.get(parallel.dcp_comm_backend)
    if backend is None or backend.prepare is None:
        return
    layers = [module for module in runner.model.modules() if isinstance(module, RadixAttention)]
    for layer in layers:
        layer.register_forward_pre_hook(note_layer)
    layout = Layout(parallel.tp_size, parallel.attn_dcp_size)
    mla = runner.use_mla_backend
    widths = {config.kv_lora_rank} if mla else {layer.v_head_dim for layer in layers}
    for width in sorted(widths):
        backend.prepare(
            parallel.dcp_group,
            max_tokens=_largest_decode_batch(),
            num_heads=config.get_max_num_attention_heads() // layout.attn_tp_size,
            head_dim=width,
            dtype=runner.dtype,
            timeout=get_device().watchdog_timeout,
        )


def _largest_decode_batch() -> int | None:
    """The larger one of what is captured and what may run; None where neither was given."""
    captured = get_exec().graph.cuda_graph_config.decode.bs or []
    return max([*captured, get_schedule().max_running_requests or 0], default=0) or None


def prepare_replicated_q_proj(original: Callable[[Any], None], runner: Any) -> None:
    """Upstream's later call: nothing is left to do."""


def refresh_replicas(
    result: tuple[bool, str] | None, updater: Any, *args: Any, **kwargs: Any
) -> None:
    """After a weight update: gather the replicas again. Every rank takes part in the update.

    Also at the end of a session of updates, which has no result: there weights that were written
    in place are absorbed, and quantized ones packed.
    """
    succeeded = result is None or result[0]
    if succeeded and get_parallel().dcp_replicate_q_proj:
        replicate_q_proj(updater.get_model(), required=False)


def replicate_q_proj(model: torch.nn.Module, *, required: bool) -> None:
    """Give every MLA layer the query weights of its whole KVP group, from its ranks' shards.

    First call: allocates. Later calls fill the same tensors, whose addresses captured graphs hold.
    Where a layer's quantization allows no replica, raises ReplicationRefusedError if `required`,
    else leaves that layer to gather its queries.
    """
    group = get_parallel().dcp_group
    for name, layer in model.named_modules():
        if not isinstance(layer, DeepseekV2AttentionMLA) or layer.w_kc is None:
            continue
        projection = layer.q_b_proj if layer.has_q_b_proj else layer.q_proj
        plain = isinstance(projection.quant_method, UnquantizedLinearMethod)
        if layer.w_kc.dtype not in _FULL_PRECISION or not (plain or _is_block_fp8(projection)):
            if required:
                raise ReplicationRefusedError(
                    f"the query projection of {name} cannot be replicated: it is quantized by "
                    f"{type(projection.quant_method).__name__}, with {layer.w_kc.dtype} absorbed "
                    "weights. Use --dcp-size with --no-dcp-replicate-q-proj in place of "
                    "--attn-tp-size or --dcp-replicate-q-proj."
                )
            logger.info("%s gathers its queries: its quantization allows no replica", name)
            continue
        if plain:
            weight = group.all_gather(projection.weight.data, dim=0)
            layer.q_b_proj_qrep_weight = _renewed(layer.q_b_proj_qrep_weight, weight)
        else:
            replica = _gather_block_fp8_linear(projection, group)
            if layer.q_b_proj_qrep is None:
                layer.q_b_proj_qrep = replica
            else:
                layer.q_b_proj_qrep.load_state_dict(replica.state_dict())
        layer.w_kc_qrep = _renewed(
            layer.w_kc_qrep, group.all_gather(layer.w_kc.contiguous(), dim=0)
        )


def _renewed(old: torch.Tensor | None, new: torch.Tensor) -> torch.Tensor:
    return new if old is None else old.copy_(new)


def _asked_for(server_args: Any) -> bool:
    """Whether the user asked for replicas; for some models SGLang turns them on by itself."""
    asked = server_args._raw_input.get("dcp_replicate_q_proj")
    return bool(asked) or attn_tp_size_of(server_args) is not None
