"""FlashAttention-3: the operator of sgl-kernel that ``sgl_kernel.flash_attn`` calls."""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sglang_cpu_reference.stand_ins.kernel import (
    FLOATS,
    Request,
    attend,
    define_operator,
    demand,
    demand_int32,
    folder_of,
    pages_of,
    spans,
)

_FP8 = torch.float8_e4m3fn
# Arguments of `fwd` for what SGLang's backends never ask of a sharded cache. (`cu_seqlens_k_new`
# is read beside `k_new` alone; upstream gives it by itself.)
_NOT_COMPUTED = (
    *("k_new", "v_new", "seqused_q", "kv_batch_idx", "leftpad_k"),
    *("rotary_cos", "rotary_sin", "seqlens_rotary", "sparse_mask_fine"),
)


def install() -> None:
    """Give ``sgl_kernel`` this operator in place of its extension, which needs a GPU driver."""
    folder = folder_of("sgl_kernel")
    extension = folder / "flash_ops.abi3.so"
    define_operator(extension, "sgl_kernel", "fwd", fwd)
    define_operator(extension, "sgl_kernel", "get_scheduler_metadata", get_scheduler_metadata)
    package = ModuleType("sgl_kernel")
    package.__path__ = [str(folder)]
    package.__dict__["flash_ops"] = torch.ops.sgl_kernel
    sys.modules["sgl_kernel"] = package
    package.__dict__["merge_state_v2"] = import_module("sgl_kernel.attention").merge_state_v2
    for module, name in (
        ("sgl_kernel.flash_attn", "is_fa3_supported"),
        ("sglang.kernels.ops.attention.flash_attention_v3", "_is_fa3_supported"),
    ):
        setattr(import_module(module), name, lambda device=None: True)


def fwd(call: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``sgl_kernel::fwd``: out in q's dtype (bf16 for fp8), LSE [H, T] or [B, H, q] natural, fp32.

    Requests without tokens get 0 and -inf. The partial results of its splits, which the kernel
    merges by itself, are NaN here.
    """
    for name in _NOT_COMPUTED:
        if getattr(call, name) is not None:
            raise NotImplementedError(f"the stand-in for FlashAttention-3 has no {name}")
    left, right = call.window_size_left, call.window_size_right
    if call.only_qv or call.attention_chunk or (left > -1 and (right, call.is_causal) != (0, True)):
        raise NotImplementedError(
            "the stand-in for FlashAttention-3 has causal windows, no only_qv"
        )
    _check(call)
    q, batch = call.q, _batch(call)
    if call.cu_seqlens_q is None:
        queries = [slice(b * q.shape[1], (b + 1) * q.shape[1]) for b in range(batch)]
    else:
        queries = spans(call.cu_seqlens_q)
        if queries[-1].stop > len(q) or max(s.stop - s.start for s in queries) > call.max_seqlen_q:
            raise IndexError(f"queries {queries} of {len(q)}, at most {call.max_seqlen_q} each")
    flat = q if q.dim() == 3 else q.flatten(0, 1)
    flat = flat.float()
    if call.q_v is not None:
        q_v = call.q_v if call.q_v.dim() == 3 else call.q_v.flatten(0, 1)
        flat = torch.cat([q_v.float(), flat], -1)
    requests = []
    for b, rows in enumerate(queries):
        keys, values = (part.float() for part in _cached(call, b))
        if call.q_v is not None:
            keys = torch.cat([values, keys], -1)
        # Scales fold into the logits before the LSE, and into the output.
        for descale in (call.q_descale, call.k_descale):
            if descale is not None:
                keys = keys * descale[b, :, None]
        if call.v_descale is not None:
            values = values * call.v_descale[b, :, None]
        requests.append(Request(rows, keys, values, causal=call.is_causal, back=left))
    out, lse = attend(
        flat, requests, scale=call.softmax_scale, logit_cap=call.softcap, sinks=call.sinks
    )
    if call.cu_seqlens_k is not None and not len(call.k):
        lse.fill_(torch.inf)  # the kernel is not launched at all
    out = out.to(torch.bfloat16 if q.dtype == _FP8 else q.dtype)
    if q.dim() == 4:
        out, lse = out.view(batch, -1, *out.shape[1:]), lse.view(batch, -1, lse.shape[1]).mT
    else:
        lse = lse.T
    if call.out is not None:
        out = call.out.copy_(out)
    splits = torch.full((0,), torch.nan)
    return out, lse.contiguous(), splits, splits.clone()


def get_scheduler_metadata(call: Any) -> Tensor:
    """``sgl_kernel::get_scheduler_metadata``: int32, which names what it was planned for."""
    demand_int32(seqused_k=call.seqused_k, cu_seqlens_q=call.cu_seqlens_q)
    demand(call.max_seqlen_q == 1, f"the stand-in plans one query, not {call.max_seqlen_q}")
    demand(len(call.seqused_k) == call.batch_size, f"lengths not of {call.batch_size} requests")
    rounded = -(-call.batch_size // 4) * 4
    plan = torch.zeros(4 * rounded + 1, dtype=torch.int32)
    heads = call.num_heads, call.num_heads_k, call.headdim
    planned = [*heads, int(call.is_causal), call.max_seqlen_k, *call.seqused_k.tolist()]
    demand(len(planned) <= len(plan), "no room to note what was planned")
    plan[: len(planned)] = torch.tensor(planned)
    return plan


def _check_plan(call: Any, batch: int) -> None:
    """The work was dealt out for this very call, and in no more splits than it has room for."""
    demand_int32(scheduler_metadata=call.scheduler_metadata)
    plan = call.scheduler_metadata.tolist()
    heads = call.q.shape[-2], call.k.shape[-2], call.q.shape[-1]
    found = [*heads, int(call.is_causal)]
    demand(plan[:4] == found, f"planned for heads, width and causality {plan[:4]}, not {found}")
    longest = call.page_table.shape[1] * call.k.shape[1]
    demand(plan[4] <= longest, f"planned for {plan[4]} tokens, room for {longest}")
    lens = call.seqused_k.tolist()
    demand(plan[5 : 5 + batch] == lens, f"planned for lengths {plan[5 : 5 + batch]}, not {lens}")


def _batch(call: Any) -> int:
    return len(call.q) if call.cu_seqlens_q is None else len(call.cu_seqlens_q) - 1


def _cached(call: Any, b: int) -> tuple[Tensor, Tensor]:
    """Keys and values of a request."""
    if call.page_table is not None:
        length = int(call.seqused_k[b])
        return tuple(pages_of(part, call.page_table[b], length) for part in (call.k, call.v))  # type: ignore[return-value]
    if call.cu_seqlens_k is not None:
        rows = spans(call.cu_seqlens_k)[b]
        if rows.stop > len(call.k) or rows.stop - rows.start > call.max_seqlen_k:
            raise IndexError(f"keys {rows} of {len(call.k)}, at most {call.max_seqlen_k} each")
        return call.k[rows], call.v[rows]
    length = call.k.shape[1] if call.seqused_k is None else int(call.seqused_k[b])
    return call.k[b, :length], call.v[b, :length]


def _check(call: Any) -> None:
    """What `mha_fwd` demands (hopper/flash_api.cpp)."""
    q, k, v, q_v = call.q, call.k, call.v, call.q_v
    demand(q.dtype in (*FLOATS, _FP8), f"q is {q.dtype}")
    for name, part in {"k": k, "v": v, "q_v": q_v}.items():
        demand(part is None or part.dtype == q.dtype, f"q is {q.dtype}, {name} is not")
    for name, part in {"q": q, "k": k, "v": v, "q_v": q_v, "out": call.out}.items():
        demand(part is None or part.stride(-1) == 1, f"{name} has gaps along its last dimension")
    demand_int32(
        page_table=call.page_table,
        cu_seqlens_q=call.cu_seqlens_q,
        cu_seqlens_k=call.cu_seqlens_k,
        seqused_k=call.seqused_k,
    )
    demand(call.cu_seqlens_q is None or call.max_seqlen_q is not None, "no max_seqlen_q")
    batch = _batch(call)
    paged, varlen_k = call.page_table is not None, call.cu_seqlens_k is not None
    demand(not (paged and varlen_k), "cu_seqlens_k beside a page table")
    demand(not varlen_k or call.max_seqlen_k is not None, "no max_seqlen_k")
    demand(not paged or call.seqused_k is not None, "a page table without lengths")
    demand(q.dim() == (4 if call.cu_seqlens_q is None else 3), f"q of shape {tuple(q.shape)}")
    demand(k.dim() == v.dim() == (3 if varlen_k else 4), f"k of shape {tuple(k.shape)}")
    demand(k.shape[:-1] == v.shape[:-1], f"k {tuple(k.shape)}, v {tuple(v.shape)}")
    of_batch = {
        "page_table": call.page_table,
        "seqused_k": call.seqused_k,
        **{name: getattr(call, name) for name in ("q_descale", "k_descale", "v_descale")},
    }
    for name, part in of_batch.items():
        demand(part is None or len(part) == batch, f"{name} is not for {batch} requests")
    demand(
        not varlen_k or len(call.cu_seqlens_k) == batch + 1, "cu_seqlens_k is for other requests"
    )
    heads, kv_heads, width, v_width = q.shape[-2], k.shape[-2], q.shape[-1], v.shape[-1]
    demand(heads % kv_heads == 0, f"{heads} query heads on {kv_heads} key-value heads")
    demand(k.shape[-1] == width, f"queries of {width}, keys of {k.shape[-1]}")
    demand(
        width <= 256 and (width == v_width or _widths_differ(width, v_width)),
        f"keys of {width} with values of {v_width}",
    )
    alignment = 16 if q.dtype == _FP8 else 8
    demand(width % alignment == v_width % alignment == 0, f"widths {width} and {v_width}")
    demand(v_width <= 256 or q.dtype in FLOATS, "wide values in fp8")
    if q_v is not None:
        demand(width <= 64 and v_width >= 256, f"q_v with keys of {width}, values of {v_width}")
        demand(q_v.shape == (*q.shape[:-1], v_width), f"q_v of shape {tuple(q_v.shape)}")
        demand(q.dtype in FLOATS, "q_v in fp8")
    for name in ("q_descale", "k_descale", "v_descale"):
        scale = getattr(call, name)
        if scale is not None:
            demand(q.dtype == _FP8, f"{name} for queries of {q.dtype}")
            demand(tuple(scale.shape) == (batch, kv_heads), f"{name} of {tuple(scale.shape)}")
            demand(scale.dtype == torch.float32, f"{name} is {scale.dtype}")
    if call.sinks is not None:
        demand(tuple(call.sinks.shape) == (heads,), f"sinks of shape {tuple(call.sinks.shape)}")
        demand(call.sinks.dtype == torch.bfloat16, f"sinks are {call.sinks.dtype}")
    demand(call.num_splits <= 256, f"{call.num_splits} splits")
    if call.scheduler_metadata is not None:
        _check_plan(call, batch)


def _widths_differ(width: int, v_width: int) -> bool:
    """Whether the kernel exists for keys and values of these different widths."""
    return (128 < width <= 192 and 96 < v_width <= 128) or (width <= 64 and v_width <= 512)
