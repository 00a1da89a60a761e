"""FlashAttention-4: the function of its CuTe interface that SGLang calls."""

import inspect
from importlib import import_module
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from sglang_cpu_reference.stand_ins import flash_attention
from sglang_cpu_reference.stand_ins.kernel import demand, on_the_device

# What it shares with FlashAttention-3, whose operator has some of it under other names.
_SAME = (
    *("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "seqused_q"),
    *("seqused_k", "page_table", "softmax_scale", "softcap", "num_splits", "pack_gqa", "out"),
    *("q_descale", "k_descale", "v_descale"),
)
_NOT_COMPUTED = (
    *("min_seqlen_k", "gather_kv_indices", "learnable_sink", "score_mod", "mask_mod", "rel_bias"),
    *("block_sparse_tensors", "aux_tensors", "aux_scalars", "sfq", "sfk", "sfv"),
)


def install() -> None:
    """In the place of the kernel that SGLang compiles for a GPU."""
    module = import_module("sglang.kernels.ops.attention.flash_attention_v4")
    real = inspect.signature(module.__dict__["_flash_attn_varlen_func"])

    @on_the_device
    def varlen(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        bound = real.bind(*args, **kwargs)
        bound.apply_defaults()
        return flash_attn_varlen_func(SimpleNamespace(**bound.arguments))

    module.__dict__["_flash_attn_varlen_func"] = varlen


def flash_attn_varlen_func(call: Any) -> tuple[Tensor, Tensor | None]:
    """Out, and the natural LSE where it is asked for: [H, T], but [T, H] beside `qv`."""
    for name in _NOT_COMPUTED:
        if getattr(call, name) is not None:
            raise NotImplementedError(f"the stand-in for FlashAttention-4 has no {name}")
    demand(call.window_size == (None, None), "the stand-in for FlashAttention-4 has no windows")
    demand(call.qv is None or call.num_splits == 1, "no splits beside qv")
    same = {name: getattr(call, name) for name in _SAME}
    absent = dict.fromkeys(flash_attention._NOT_COMPUTED)
    out, lse, *_ = flash_attention.fwd(
        SimpleNamespace(
            **{**absent, **same, "softcap": call.softcap or 0.0},
            q_v=call.qv,
            is_causal=call.causal,
            only_qv=False,
            attention_chunk=0,
            window_size_left=-1,
            window_size_right=-1,
            scheduler_metadata=None,
            sinks=None,
        )
    )
    if not call.return_lse:
        return out, None
    return out, lse if call.qv is None else lse.mT.contiguous()
