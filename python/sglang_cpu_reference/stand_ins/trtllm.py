"""TensorRT-LLM's attention: the function of FlashInfer by which SGLang decodes on Blackwell."""

import inspect
import math
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from sglang_cpu_reference.stand_ins.kernel import (
    FLOATS,
    Request,
    attend,
    demand,
    demand_int32,
    on_the_device,
    pages_of,
)

_FP8 = torch.float8_e4m3fn
_PLAIN = {
    "window_left": -1,
    "kv_layout": "HND",
    "q_len_per_req": 1,
    "backend": "trtllm-gen",
    "cp_world": 1,
    "uses_shared_paged_kv_idx": True,
    "enable_block_sparse_attention": False,
}
_NOT_COMPUTED = ("sinks", "mask", "max_q_len", "cum_seq_lens_q", "kv_cache_sf", "lse", "out")


def install() -> None:
    """In the place of the kernels that FlashInfer downloads for a GPU."""
    module = import_module("flashinfer.decode")
    real = inspect.signature(module.trtllm_batch_decode_with_kv_cache)

    @on_the_device
    def decode(*args: Any, **kwargs: Any) -> Any:
        bound = real.bind(*args, **kwargs)
        bound.apply_defaults()
        return trtllm_batch_decode_with_kv_cache(SimpleNamespace(**bound.arguments))

    module.__dict__["trtllm_batch_decode_with_kv_cache"] = decode
    import_module("flashinfer.utils").__dict__["get_device_sm_count"] = lambda device: 148
    # It imports FlashInfer where it finds a GPU.
    backend = import_module("sglang.srt.layers.attention.trtllm_mla_backend")
    backend.__dict__["flashinfer"] = import_module("flashinfer")


def trtllm_batch_decode_with_kv_cache(call: Any) -> tuple[Tensor, Tensor]:
    """Out [T, H, D], and the LSE [T, H] to the base of 2. Requests without tokens: NaN."""
    for name in _NOT_COMPUTED:
        if getattr(call, name) is not None:
            raise NotImplementedError(f"the stand-in for trtllm-gen has no {name}")
    for name, value in _PLAIN.items():
        if getattr(call, name) != value:
            raise NotImplementedError(f"the stand-in for trtllm-gen has {name} {value} alone")
    q, (keys, values) = call.query, call.kv_cache
    demand(call.return_lse, "the stand-in for trtllm-gen returns its LSE")
    demand(q.is_contiguous(), "the query has gaps")
    demand(q.dtype in (*FLOATS, _FP8), f"the query is {q.dtype}")
    demand(keys.dtype == values.dtype == q.dtype, f"a query of {q.dtype}, keys of {keys.dtype}")
    demand(keys.stride(-1) == 1, "keys have gaps along their last dimension")
    demand(keys.shape[2] in (16, 32, 64), f"pages of {keys.shape[2]}")
    demand_int32(block_tables=call.block_tables, seq_lens=call.seq_lens)
    # Of 384 MiB a byte of each page of memory: all of them take longer than the attention.
    demand(not call.workspace_buffer.flatten()[::4096].any(), "the workspace is not zero")
    longest = call.block_tables.shape[1] * keys.shape[2]
    demand(call.max_seq_len <= longest, f"lengths up to {call.max_seq_len}, table for {longest}")
    requests = []
    for b, length in enumerate(call.seq_lens.tolist()):
        demand(0 <= length <= call.max_seq_len, f"length {length} of {call.max_seq_len} at most")
        if length:
            k, v = (
                pages_of(part.transpose(1, 2), call.block_tables[b], length).float()
                for part in (keys, values)
            )
            requests.append(Request(slice(b, b + 1), k, v))
    out, lse = attend(q.float(), requests, scale=call.bmm1_scale)
    return (out * call.bmm2_scale).to(call.out_dtype or q.dtype), lse / math.log(2)
