"""MLA: the Triton kernels of SGLang that its backends and its prefill in chunks launch."""

from collections.abc import Callable
from importlib import import_module

import torch
from torch import Tensor

from sglang_cpu_reference.stand_ins.kernel import demand, demand_int32, on_the_device


def install() -> None:
    """Plain torch in the place of these kernels."""
    batch = import_module("sglang.srt.model_executor.forward_batch_deepseek_mha_mixin")
    batch.__dict__["create_chunked_prefix_cache_kv_indices"] = _Launched(list_chunk)
    planner = import_module("sglang.srt.layers.dcp.planner")
    planner.__dict__["update_kv_lens_and_indices"] = _Launched(take_local)
    merge = import_module("sglang.srt.layers.attention.merge_state")
    merge.__dict__["merge_state_triton"] = merge_state


class _Launched:
    """A function that is called as Triton's kernels are, with a grid before its arguments."""

    def __init__(self, kernel: Callable[..., None]) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return self.kernel


@on_the_device
def list_chunk(
    req_to_token: Tensor,
    requests: Tensor,
    starts: Tensor,
    lens: Tensor,
    indptr: Tensor,
    out: Tensor,
    stride: int,
) -> None:
    """The slots of a chunk of each request's prefix, request after request."""
    demand(stride == req_to_token.stride(0), f"rows {stride} apart")
    demand_int32(starts=starts, lens=lens, indptr=indptr, out=out)
    for request, start, length, first in zip(
        *(part.tolist() for part in (requests, starts, lens, indptr)), strict=False
    ):
        out[first : first + length] = req_to_token[request, start : start + length]


@on_the_device
def take_local(
    lens: Tensor,
    indptr: Tensor,
    slots: Tensor,
    local_lens: Tensor,
    local_indptr: Tensor,
    local_slots: Tensor,
    *,
    dcp_rank: int,
    dcp_world_size: int,
    BLOCK_SIZE: int,
) -> None:
    """Of each request's slots those of this rank."""
    for first, local_first, count in zip(
        *(part.tolist() for part in (indptr, local_indptr, local_lens)), strict=False
    ):
        theirs = first + dcp_rank + dcp_world_size * torch.arange(count)
        local_slots[local_first : local_first + count] = slots[theirs]


@on_the_device
def merge_state(
    prefix: Tensor,
    prefix_lse: Tensor,
    suffix: Tensor,
    suffix_lse: Tensor,
    output: Tensor,
    output_lse: Tensor,
) -> tuple[Tensor, Tensor]:
    """Two partial results [T, H, D] by their natural LSEs [T, H]; +inf counts as empty."""
    outs = torch.stack([prefix, suffix])
    lses = torch.stack([prefix_lse, suffix_lse])
    lses = lses.masked_fill(lses.isposinf(), -torch.inf)
    output.copy_((outs * lses.softmax(0)[..., None]).sum(0))
    output_lse.copy_(lses.logsumexp(0))
    return output, output_lse
