"""FlashMLA: the dense decode operators that ``flash_mla`` takes from its extensions."""

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
    on_the_device,
    pages_of,
)

_NAMESPACE = "flash_mla_legacy"
_SMS = 132  # of an H200
_PAGE = 64
_TILE = 64  # query rows of one program
_LATENT, _ROPE = 512, 64


def install() -> None:
    """Give ``flash_mla`` these operators in place of its extensions, which need a GPU driver."""
    extension = folder_of("flash_mla") / "_C_legacy.abi3.so"
    for operator in (
        get_mla_decoding_metadata,
        get_mla_decoding_metadata_dense_fp8,
        dense_decode_fwd,
        fwd_kvcache_mla_fp8,
    ):
        define_operator(extension, _NAMESPACE, operator.__name__, operator)
    loader = ModuleType("flash_mla._loader")
    loader.__dict__["get_ops"] = lambda use_legacy: getattr(
        torch.ops, _NAMESPACE if use_legacy else "flash_mla"
    )
    loader.__dict__["has_legacy"] = lambda: True
    sys.modules[loader.__name__] = loader
    quantization = import_module("sglang.kernels.ops.quantization.fp8_kernel")
    quantization.__dict__["sgl_per_tensor_quant_fp8"] = per_tensor_quant_fp8


@on_the_device
def per_tensor_quant_fp8(x: Tensor, out: Tensor, scale: Tensor, is_static: bool) -> None:
    """The kernel of sgl-kernel that quantizes by a given scale."""
    demand(is_static, "the stand-in looks for no scale")
    out.copy_((x / scale).clamp(-448.0, 448.0))


def get_mla_decoding_metadata(call: Any) -> list[Tensor]:
    """Schedule [programs, 8] and the splits' prefix sums [B + 1], both int32.

    They name the lengths they were made for, so that decoding finds a schedule of others.
    """
    demand(call.topk is None and not call.is_fp8_kvcache, "a schedule of sparse attention")
    return _schedule(call.seqlens_k, call.num_q_tokens_per_head_k, call.h_k)


def get_mla_decoding_metadata_dense_fp8(call: Any) -> list[Tensor]:
    """The same for caches in fp8."""
    return _schedule(call.seqlens_k, call.num_heads_per_head_k, call.num_heads_k)


def dense_decode_fwd(call: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Out [B, q, H, 512] in q's dtype, and its natural-log LSE [B, H, q].

    Requests without tokens get 0 and +inf; the kernel fetches their first page all the same.
    """
    demand(call.q.dtype in FLOATS, f"q is {call.q.dtype}")
    demand(call.q.dtype == call.kcache.dtype, f"q is {call.q.dtype}, kcache {call.kcache.dtype}")
    for table in call.block_table:
        pages_of(call.kcache, table, 1)
    out, lse = _decode(call, call.q, call.kcache)
    return out, lse, call.tile_scheduler_metadata, call.num_splits


def fwd_kvcache_mla_fp8(call: Any) -> list[Tensor]:
    """The same over a cache in fp8, its queries too: out in bf16.

    A request without tokens has the kernel read in front of its page table, so none may be.
    """
    for name, part in {"q": call.q, "kcache": call.kcache}.items():
        demand(part.dtype == torch.float8_e4m3fn, f"{name} is {part.dtype}")
    for name, scale in {"descale_q": call.descale_q, "descale_k": call.descale_k}.items():
        demand(scale is not None and scale.shape == (1,), f"{name} must be one number")
        demand(scale.dtype == torch.float32, f"{name} is {scale.dtype}")
    if not (call.seqlens_k > 0).all():
        raise IndexError(f"a request without tokens reads block_table[-1]: {call.seqlens_k}")
    q, kcache = call.q.float() * call.descale_q, call.kcache.float() * call.descale_k
    out, lse = _decode(call, q, kcache)
    return [out.to(torch.bfloat16), lse]


def _schedule(lens: Tensor, rows: int, kv_heads: int) -> list[Tensor]:
    demand_int32(seqlens_k=lens)
    programs = max(1, _SMS // kv_heads // -(-rows // _TILE))
    schedule = torch.full((programs, 8), rows, dtype=torch.int32)
    splits = torch.zeros(len(lens) + 1, dtype=torch.int32)
    splits[1:] = (lens + 1).cumsum(0)
    return [schedule, splits]


def _decode(call: Any, q: Tensor, kcache: Tensor) -> tuple[Tensor, Tensor]:
    """Attention in fp32, out in q's dtype."""
    lens, tables = call.seqlens_k, call.block_table
    demand_int32(seqlens_k=lens, block_table=tables)
    batch, queries, heads, width = q.shape
    demand(width == _LATENT + _ROPE and call.head_size_v == _LATENT, f"queries of {width}")
    demand(kcache.shape[1:] == (_PAGE, 1, width), f"a cache of {tuple(kcache.shape)}")
    demand(call.q.stride(-1) == call.kcache.stride(-1) == 1, "gaps along the last dimension")
    demand(len(lens) == len(tables) == batch, f"{len(lens)} lengths for {batch} requests")
    wanted = _schedule(lens, queries * heads, 1)
    for found, made in zip((call.tile_scheduler_metadata, call.num_splits), wanted, strict=True):
        demand(
            found is not None and found.dtype == torch.int32 and torch.equal(found, made),
            f"a schedule for other lengths or heads: {found}, not {made}",
        )
    requests = []
    for b in range(batch):
        keys = pages_of(kcache, tables[b], int(lens[b])).float()
        rows = slice(b * queries, (b + 1) * queries)
        requests.append(Request(rows, keys, keys[..., :_LATENT], causal=call.is_causal))
    flat = q.float().flatten(0, 1)
    out, lse = attend(flat, requests, scale=call.softmax_scale)
    lse = lse.masked_fill(lse.isneginf(), torch.inf)
    out = out.view(batch, queries, heads, _LATENT)
    return out.to(q.dtype), lse.view(batch, queries, heads).mT.contiguous()
