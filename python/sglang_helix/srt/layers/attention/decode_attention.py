"""The first stage of Triton's decode. Extends `kernels/ops/attention/decode_attention.py`."""

from __future__ import annotations

import triton
from sglang.kernels.ops.attention.decode_attention import (
    _decode_att_m_fwd,
    _fwd_grouped_kernel_stage1,
)
from torch import Tensor

from sglang_helix.srt.layers.attention.kv_splits import BLOCK, Tile


def first_stage(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    out: Tensor,
    lse: Tensor,
    indptr: Tensor,
    indices: Tensor,
    counts: Tensor,
    scaling: float,
    logit_cap: float,
    xai_temperature_len: int,
    mla: bool,
    tile: Tile,
) -> None:
    """Upstream's first decode stage: q [B, H, Dk] over rows of a pool -> out and lse by split.

    Its launcher has one tile of heads for every model; a launch of its own takes others.
    """
    (batch, heads, width), (kv_heads, v_width), most = q.shape, values.shape[1:], out.shape[2]
    if heads == kv_heads:
        _decode_att_m_fwd(
            q,
            keys,
            values,
            out,
            lse,
            indptr,
            indices,
            counts,
            most,
            scaling,
            logit_cap,
            xai_temperature_len,
        )
        return
    group = heads // kv_heads
    # Rotary parts of MLA's keys make a tile of their own, since tiles are powers of two.
    whole = {576: 512, 288: 256}.get(width, triton.next_power_of_2(width))
    _fwd_grouped_kernel_stage1[(batch, -(-heads // min(tile.heads, group)), most)](
        q,
        keys,
        values,
        scaling,
        indptr,
        indices,
        out,
        lse,
        counts,
        *q.stride()[:2],
        *keys.stride()[:2],
        *values.stride()[:2],
        *(0, 0, 0, 0),  # strides of pages, read where PAGE_SIZE is not 1
        *out.stride()[:3],
        kv_group_num=group,
        q_head_num=heads,
        BLOCK_DMODEL=whole,
        BLOCK_DPE=max(0, width - whole),
        BLOCK_DV=triton.next_power_of_2(v_width),
        BLOCK_N=tile.tokens,
        BLOCK_H=tile.heads,
        MIN_BLOCK_KV=BLOCK,
        logit_cap=logit_cap,
        xai_temperature_len=xai_temperature_len,
        Lk=width,
        Lv=v_width,
        HAS_MLA=mla,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
