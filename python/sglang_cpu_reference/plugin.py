"""Hooks the platform needs where SGLang has no seam for an out-of-tree CPU.

A general plugin (entry point group ``sglang.srt.plugins``). It does nothing unless the platform is
selected, and stops the process when a hook did not take: SGLang itself would log and carry on.
"""

import multiprocessing
from collections.abc import Callable
from typing import Any

import psutil
import torch
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from sglang_cpu_reference import (
    forkserver,
    linear_attention,
    selected,
    speculative,
    transfer_engine,
)

_START_METHOD_SET_IN = "sglang.srt.entrypoints.engine._set_envs_and_config"
_EXPERTS = "sglang.srt.layers.moe.fused_moe_native.moe_forward_native"
_ROTARY = "sglang.srt.layers.rotary_embedding"
_BOOTSTRAP = "sglang.srt.distributed.bootstrap"


def register() -> None:
    """Entry point: register every hook of the platform, in every SGLang process."""
    if not selected():
        return
    from sglang.srt.arg_groups.choices import add_draft_attention_backend_choices
    from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook

    add_draft_attention_backend_choices(["torch_native"])
    register_resolution_hook("handle_missing_default_values")(_serve_on_the_cpu)
    register_resolution_hook("handle_cpu_backends")(_plain_torch_backends)
    register_resolution_hook("handle_hicache")(_plain_torch_transfers)
    if multiprocessing.parent_process() is None:
        HookRegistry.register(_START_METHOD_SET_IN, forkserver.use, HookType.AFTER)
    for target, replacement in _REPLACED.items():
        HookRegistry.register(target, replacement, HookType.REPLACE)
    for target, before in _BEFORE.items():
        HookRegistry.register(target, before, HookType.BEFORE)
    for target, wrapper in _AROUND.items():
        HookRegistry.register(target, wrapper, HookType.AROUND)
    linear_attention.install()
    speculative.install()
    transfer_engine.install()  # a rank makes its engine before it imports what runs models
    collectives_on_cpu_tensors()


def collectives_on_cpu_tensors() -> None:
    """``all_gather_into_tensor`` and ``reduce_scatter_tensor`` of SGLang's groups, over gloo.

    Groups take CPU tensors only where SGLang knows the in-tree CPU platform; elsewhere they go
    through custom ops, which an out-of-tree platform has for accelerator tensors alone.
    """
    from sglang.srt.distributed import parallel_state

    if not hasattr(parallel_state, "_is_cpu"):
        raise SystemExit(
            "SGLANG_PLATFORM=cpu_reference: this SGLang decides elsewhere whether a process group "
            "is on the CPU; install the SGLang this was made for."
        )
    parallel_state._is_cpu = True


def _serve_on_the_cpu(server_args: Any, previous: Callable[[Any], None]) -> None:
    """``--device`` defaults to cpu also where SGLang would find a GPU; nothing else is served."""
    from sglang.srt.arg_groups.overrides import declare_resolution, resolving_view

    device = resolving_view(server_args).device
    if device is None:
        declare_resolution(server_args, "cpu_reference", device="cpu")
    elif device != "cpu":
        raise ValueError(
            f"SGLANG_PLATFORM=cpu_reference runs on --device cpu only, not {device!r}; "
            "leave --device out, or unset SGLANG_PLATFORM."
        )
    previous(server_args)


def _plain_torch_backends(server_args: Any, previous: Callable[[Any], None]) -> None:
    """In place of upstream's CPU defaults, which are the Intel AMX kernels."""
    from sglang.srt.arg_groups.overrides import declare_resolution, resolving_view

    cfg = resolving_view(server_args)
    if cfg.attention_backend is None:
        declare_resolution(server_args, "cpu_reference", attention_backend="torch_native")
    declare_resolution(server_args, "cpu_reference", sampling_backend="pytorch")


def _plain_torch_transfers(server_args: Any, previous: Callable[[Any], None]) -> None:
    """The hierarchical cache's default is a kernel; `kv_transfer` has the other way."""
    from sglang.srt.arg_groups.overrides import declare_resolution

    declare_resolution(server_args, "cpu_reference", hicache_io_backend="direct")
    previous(server_args)


def _bind_threads(*, device: str) -> None:
    """Upstream wants one NUMA node per rank here; ours share the cores, one thread each."""
    torch.set_num_threads(1)


def _no_threads_env(*, local_omp_cpuid: object, dist_init_method: str | None = None) -> None:
    """Upstream's shared-memory all-reduce belongs to sgl-kernel; gloo serves instead."""


def _config_as_it_is(model_config: Any, load_config: object, tp_size: int) -> Any:
    """No padding of heads: SGLang's own KV head replication serves tp > KV heads, as on a GPU."""
    return model_config


def _memory_of_one_rank() -> int:
    """``get_free_cpu_memory``: bytes of this machine's that this process does not hold itself.

    Ranks compare what is free before and after they load, as on a GPU of their own; what other
    processes take and give back meanwhile must not decide whether a server starts.
    """
    from sglang.srt.utils.common import get_instance_memory_status

    limit = get_instance_memory_status("/sys/fs/cgroup/memory.max")
    capacity = psutil.virtual_memory().total
    held = psutil.Process().memory_info().rss
    return min(capacity, limit or capacity) - held


def _read_mla_rows(
    pool: Any, layer: Any, loc: torch.Tensor, dst_dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """``MLATokenToKVPool.get_mla_kv_buffer``, upstream a Triton kernel: rows in two parts."""
    rows = pool.get_key_buffer(layer.layer_id)[loc.long()].to(dst_dtype or pool.dtype)
    return rows[..., : pool.kv_lora_rank], rows[..., pool.kv_lora_rank :]


def _unpinned(*args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Host copies of the KV pool in plain memory; there is no device to pin it for."""
    return args, {**kwargs, "pin_memory": False}


def _padded_on_the_cpu(batch: Any, runner: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Batches of attention replicas are made as long as each other, without pinned memory.

    Adapters on stand-ins for kernels are asked what a GPU's would be: a padded request's length.
    """
    from sglang.srt.model_executor import forward_batch_info

    forward_batch_info._is_cpu = True
    backend = runner.attn_backend
    if not hasattr(backend, "get_cpu_graph_seq_len_fill_value"):
        backend.get_cpu_graph_seq_len_fill_value = backend.get_cuda_graph_seq_len_fill_value
    return (batch, runner), {}


def _copy_rows(dst: Any, src: Any, dim: int, offset: Any, sz: Any, offset_src: bool) -> None:
    """``memcpy`` of attention data parallelism, a Triton kernel elsewhere: upstream's for CPUs."""
    from sglang.srt.layers.dp_attention import memcpy_cpu

    memcpy_cpu(dst, src, dim, offset, sz, offset_src)


def _add_gated(
    hidden_states: torch.Tensor,
    gate_weight: torch.Tensor,
    shared_output: torch.Tensor,
    final_hidden_states: torch.Tensor,
) -> None:
    """``fused_gate_sigmoid_mul_add``, a Triton kernel: Qwen's shared expert behind its gate.

    hidden_states, shared_output and final_hidden_states [T, D], gate_weight [D]; adds in place.
    """
    gate = torch.sigmoid(hidden_states @ gate_weight)
    final_hidden_states += gate[:, None] * shared_output


def _gated(
    attn_output: torch.Tensor, gate: torch.Tensor, inplace: bool = False, quant: bool = False
) -> torch.Tensor:
    """``fused_sigmoid_mul``, a Triton kernel: attention [T, H D], gate [T, H D] or [T, H, D]."""
    assert not quant
    gated = attn_output * torch.sigmoid(gate.reshape(attn_output.shape))
    return attn_output.copy_(gated) if inplace else gated


def _experts_of_this_rank(
    original: Callable[..., Any], layer: Any, x: torch.Tensor, topk_output: Any, config: Any
) -> Any:
    """Around ``moe_forward_native``, which takes -1, an expert of another rank, for a number.

    An expert named twice it counts once: LongCat names its first, without weight, where a token
    has none. What is left of a token's experts comes as so many tokens of one expert each.
    """
    own = (topk_output.topk_ids >= 0) & (topk_output.topk_weights != 0)
    if own.all():
        return original(layer, x, topk_output, config)
    answer = torch.zeros_like(x)
    if own.any():
        token = own.nonzero()[:, 0]
        alone = topk_output._replace(
            topk_ids=topk_output.topk_ids[own][:, None],
            topk_weights=topk_output.topk_weights[own][:, None],
        )
        answer.index_add_(0, token, original(layer, x[token], alone, config))
    return answer


def _identity_experts(
    expert_indices: torch.Tensor,
    expert_scales: torch.Tensor,
    num_experts: int,
    zero_expert_type: str,
    hidden_states: torch.Tensor,
) -> torch.Tensor:
    """``zero_experts_compute_triton``: LongCat's experts [T, topk] that give back their input.

    They are those from num_experts on; leaves the first expert in their place, without weight.
    """
    assert zero_expert_type == "identity"
    identity = expert_indices >= num_experts
    scales = expert_scales.where(identity, 0).sum(-1, keepdim=True)
    expert_indices[identity], expert_scales[identity] = 0, 0.0
    return hidden_states * scales


def _nothing_to_wait_for(device: object = None) -> None:
    """``torch.cuda.synchronize``, which SGLang calls for the device of PyTorch's build."""


def _the_cpu() -> torch.device:
    """``torch.cuda.current_device``: models allocate some of their weights there."""
    return torch.device("cpu")


def _not_pinned(tensor: torch.Tensor, *_: object) -> torch.Tensor:
    """``Tensor.pin_memory``: see `_unpinned`."""
    return tensor


def _capped(full_logits: torch.Tensor, final_logit_softcapping: float) -> torch.Tensor:
    """``softcap_inplace_logits`` in torch: Gemma-2 caps the logits of its head."""
    cap = final_logit_softcapping
    return full_logits.div_(cap).tanh_().mul_(cap)


def _rotary(original: Callable[..., Any], *args: Any) -> Any:
    """Around ``get_rope_cpu``, which knows DeepSeek's scaling alone; else as everywhere.

    args: as `get_rope_wrapper` hands them on, the scaling sixth and the device last.
    """
    from sglang.srt.layers.rotary_embedding import get_rope

    scaling = args[5]
    known = scaling is not None and scaling["rope_type"] == "deepseek_yarn"
    return original(*args) if known else get_rope(*args[:-1])


def _rotated(embedding: Any, *args: Any, **kwargs: Any) -> Any:
    """``RotaryEmbedding.forward_cuda``, which Ring-2.5's latent attention asks for by name."""
    return embedding.forward_native(*args, **kwargs)


_AROUND: dict[str, Callable[..., Any]] = {
    _EXPERTS: _experts_of_this_rank,
    f"{_ROTARY}.factory.get_rope_cpu": _rotary,
    **speculative.AROUND,
}
_REPLACED: dict[str, Callable[..., Any]] = {
    f"{_BOOTSTRAP}._bind_threads_if_cpu": _bind_threads,
    f"{_BOOTSTRAP}._init_cpu_threads_env": _no_threads_env,
    "sglang.srt.configs.update_config.adjust_config_with_unaligned_cpu_tp": _config_as_it_is,
    "sglang.srt.utils.common.get_free_cpu_memory": _memory_of_one_rank,
    "sglang.srt.mem_cache.memory_pool.MLATokenToKVPool.get_mla_kv_buffer": _read_mla_rows,
    "sglang.kernels.ops.elementwise.elementwise.fused_gate_sigmoid_mul_add": _add_gated,
    "sglang.kernels.ops.elementwise.elementwise.fused_sigmoid_mul": _gated,
    "sglang.srt.layers.dp_attention.memcpy": _copy_rows,
    "sglang.kernels.ops.activation.softcap.softcap_inplace_logits": _capped,
    "sglang.kernels.ops.moe.ep_moe_kernels.zero_experts_compute_triton": _identity_experts,
    f"{_ROTARY}.base.RotaryEmbedding.forward_cuda": _rotated,
    "torch.cuda.synchronize": _nothing_to_wait_for,
    "torch.cuda.current_device": _the_cpu,
    "torch.Tensor.pin_memory": _not_pinned,
    **linear_attention.REPLACED,
    **speculative.REPLACED,
}


_BEFORE: dict[str, Callable[..., Any]] = {
    "sglang.srt.mem_cache.pool_host.base.HostKVCache.__init__": _unpinned,
    "sglang.srt.model_executor.forward_batch_info.ForwardBatch.prepare_mlp_sync_batch": (
        _padded_on_the_cpu
    ),
}


def verify() -> None:
    """Stop the process unless every hook took; called in each rank before it builds a group."""
    hooked = {*_REPLACED, *_AROUND, *_BEFORE}
    missing = sorted(hooked - HookRegistry._patched)
    if missing:
        raise SystemExit(
            f"SGLANG_PLATFORM=cpu_reference: hooks not applied: {', '.join(missing)}; install the "
            "SGLang this was made for, and name 'cpu_reference' in SGLANG_PLUGINS if that is set."
        )
