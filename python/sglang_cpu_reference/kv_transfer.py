"""The hierarchical cache's transfers between device and host, upstream kernels of sgl-kernel.

Here both are the same memory; what is copied between them is exactly what a GPU would copy. These
serve `--hicache-io-backend direct` with either of its layouts.
"""

from collections.abc import Sequence

import torch


def install() -> None:
    """Give SGLang's host pools, which import the kernels on accelerators only, these instead."""
    from sglang.srt.mem_cache.pool_host import base, mha, mla

    for operation in (
        transfer_kv_direct,
        transfer_kv_per_layer_direct_pf_lf,
        transfer_kv_all_layer_direct_lf_pf,
    ):
        for module in (mha, mla):
            setattr(module, operation.__name__, operation)
    # Upstream leaves 10 GiB to the machine, more than a small one has free; pools here are tiny.
    base.HICACHE_HOST_MEMORY_RESERVE_BYTES = 0


def transfer_kv_direct(
    src_layers: Sequence[torch.Tensor],
    dst_layers: Sequence[torch.Tensor],
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    page_size: int,
) -> None:
    """Rows src_indices [S] of each layer [rows, heads, dim] to rows dst_indices of its copy."""
    for src, dst in zip(src_layers, dst_layers, strict=True):
        dst[dst_indices] = src[src_indices]


def transfer_kv_per_layer_direct_pf_lf(
    src_ptrs: Sequence[torch.Tensor],
    dst_ptrs: Sequence[torch.Tensor],
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    layer_id: int,
    page_size: int,
) -> None:
    """One layer from the host, [pages, layers, page_size, heads, dim], to rows of the device."""
    for src, dst in zip(src_ptrs, dst_ptrs, strict=True):
        dst[dst_indices] = src[src_indices // page_size, layer_id, src_indices % page_size]


def transfer_kv_all_layer_direct_lf_pf(
    src_ptrs: Sequence[torch.Tensor],
    dst_ptrs: Sequence[torch.Tensor],
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    page_size: int,
) -> None:
    """Rows of every layer of the device to the host, [pages, layers, page_size, heads, dim].

    src_ptrs: the layers of the first buffer of dst_ptrs, then those of the next.
    """
    layers = len(src_ptrs) // len(dst_ptrs)
    for number, src in enumerate(src_ptrs):
        dst = dst_ptrs[number // layers]
        dst[dst_indices // page_size, number % layers, dst_indices % page_size] = src[src_indices]
