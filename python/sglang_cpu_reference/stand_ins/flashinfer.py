"""FlashInfer: the modules that its wrappers for decoding and prefill compile, and its MLA wrapper.

The wrappers for keys and values are the real ones: their checks, their buffers for captured graphs
and their copies to the host run as they do on a GPU. LSEs are to the base of 2.
"""

import inspect
import math
from collections.abc import Iterable
from importlib import import_module
from types import CodeType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sglang_cpu_reference.stand_ins.kernel import (
    FLOATS,
    Request,
    attend,
    demand,
    demand_int32,
    host_torch,
    on_the_device,
    pages_of,
    spans,
)

_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
# flashinfer.utils: MaskMode, and TensorLayout.NHD.
_NON_CAUSAL, _CAUSAL, _CUSTOM = 0, 1, 2
_NHD = 0
_BOUND = (
    "BatchDecodeWithPagedKVCacheWrapper",
    "BatchMLAPagedAttentionWrapper",
    "BatchPrefillWithPagedKVCacheWrapper",
    "BatchPrefillWithRaggedKVCacheWrapper",
    "fast_decode_plan",
)


def install() -> None:
    """Give FlashInfer these modules, and SGLang FlashInfer, which it wants a GPU for."""
    import flashinfer

    decode, prefill = import_module("flashinfer.decode"), import_module("flashinfer.prefill")
    # What is asked of the device in order to choose a kernel.
    import_module("flashinfer.utils").__dict__["get_compute_capability"] = lambda device: (9, 0)
    decoding, prefilling = _decode_module(decode), _prefill_module(prefill)
    for module in (decode, prefill):
        module.__dict__.update(
            torch=host_torch(),
            device_support_pdl=lambda device: False,
            determine_attention_backend=lambda *_, **__: "fa2",
            get_batch_prefill_module=lambda *_: prefilling,
        )
    decode.__dict__["get_batch_decode_module"] = lambda *_: decoding
    prefill.__dict__["segment_packbits"] = segment_packbits
    flashinfer.__dict__["BatchMLAPagedAttentionWrapper"] = MLAWrapper
    translator = import_module("sglang.srt.mem_cache.kv_index_translator")
    translator.__dict__["create_flashinfer_kv_indices_triton"] = _Launched()
    # SGLang's backends bind these only where they find a GPU.
    for name in ("flashinfer_backend", "flashinfer_mla_backend"):
        backend = import_module(f"sglang.srt.layers.attention.{name}")
        bound = {symbol: getattr(flashinfer, symbol) for symbol in _BOUND}
        backend.__dict__.update(bound, torch=host_torch())


class Plan(NamedTuple):
    """What a plan was made for, read on the host; its wrapper hands it to every run."""

    queries: list[int] | None
    pages: list[int]
    heads: int
    kv_heads: int
    page_size: int


def _parameters(factory: Any, inner: str) -> tuple[str, ...]:
    """Parameter names of a function that is defined inside another one."""
    for constant in inspect.unwrap(factory).__code__.co_consts:
        if isinstance(constant, CodeType) and constant.co_name == inner:
            return constant.co_varnames[: constant.co_argcount]
    raise RuntimeError(f"{factory} defines no {inner}")


def _named(names: Iterable[str], args: Iterable[Any]) -> Any:
    """Positional arguments by their names; TypeError where there are more than names."""
    names, args = tuple(names), tuple(args)
    if len(args) > len(names):
        raise TypeError(f"{len(args)} arguments for {', '.join(names)}")
    return SimpleNamespace(**{**dict.fromkeys(names), **dict(zip(names, args, strict=False))})


def _decode_module(decode: Any) -> SimpleNamespace:
    """What `get_batch_decode_module` compiles: a kernel without tensor cores."""
    names = _parameters(decode.get_batch_decode_module, "run_batch_decode")

    def plan(*args: Any) -> Plan:
        if len(args) != 15:
            raise TypeError(f"{len(args)} arguments in the place of 15")
        pages, batch, heads, kv_heads, page_size = args[3:8]
        demand(len(pages) == batch + 1, f"{len(pages)} prefix sums for {batch} requests")
        return Plan(None, pages.tolist(), heads, kv_heads, page_size)

    @on_the_device
    def run(*args: Any) -> None:
        call = _named(names, args)
        queries = [slice(row, row + 1) for row in range(len(call.q))]
        _over_pages(call, queries, call.kv_layout_code, _NON_CAUSAL)

    return SimpleNamespace(plan=plan, run=run, workspace_size=None)


def _prefill_module(prefill: Any) -> SimpleNamespace:
    """What `get_batch_prefill_module` compiles for its backend "fa2"; decodes with tensor cores."""
    paged_names, ragged_names = (
        _parameters(prefill.get_batch_prefill_module, run) for run in ("paged_run", "ragged_run")
    )

    def plan(*args: Any) -> Plan:
        if len(args) != 20:
            raise TypeError(f"{len(args)} arguments in the place of 20")
        queries, pages, _, _, batch, heads, kv_heads, page_size = args[3:11]
        demand(len(pages) == batch + 1, f"{len(pages)} prefix sums for {batch} requests")
        return Plan(queries.tolist(), pages.tolist(), heads, kv_heads, page_size)

    @on_the_device
    def paged_run(*args: Any) -> None:
        call = _named(paged_names, args)
        demand_int32(qo_indptr=call.qo_indptr)
        _same("queries", call.qo_indptr, call.plan_info_vec.queries)
        _over_pages(call, spans(call.qo_indptr), call.layout, call.mask_mode)

    @on_the_device
    def ragged_run(*args: Any) -> None:
        call = _named(ragged_names, args)
        demand_int32(qo_indptr=call.qo_indptr, kv_indptr=call.kv_indptr)
        _same("queries", call.qo_indptr, call.plan_info_vec.queries)
        _same("keys", call.kv_indptr, call.plan_info_vec.pages)
        demand(call.layout == _NHD, f"layout {call.layout}")
        _check_heads(call.q, call.k, call.plan_info_vec)
        demand(call.q.dtype == call.k.dtype == call.v.dtype, f"q {call.q.dtype}, k {call.k.dtype}")
        keys: list[tuple[Tensor, ...]] = [
            (call.k[rows], call.v[rows]) for rows in spans(call.kv_indptr)
        ]
        _write(call, spans(call.qo_indptr), keys, call.mask_mode)

    return SimpleNamespace(plan=plan, paged_run=paged_run, ragged_run=ragged_run)


def _over_pages(call: Any, queries: list[slice], layout: int, mask_mode: int) -> None:
    """The kernels over a paged cache: what their wrapper calls them with, `queries` by request."""
    demand_int32(
        paged_kv_indptr=call.paged_kv_indptr,
        paged_kv_indices=call.paged_kv_indices,
        paged_kv_last_page_len=call.paged_kv_last_page_len,
    )
    demand(layout == _NHD, f"layout {layout}")
    demand(call.plan_info_vec is not None, "no plan")
    _same("pages", call.paged_kv_indptr, call.plan_info_vec.pages)
    _check_heads(call.q, call.paged_k_cache, call.plan_info_vec)
    keys: list[tuple[Tensor, ...]] = []
    for b, rows in enumerate(spans(call.paged_kv_indptr)):
        if rows.stop > len(call.paged_kv_indices):
            raise IndexError(f"pages {rows} of {len(call.paged_kv_indices)}")
        pages, page_size = call.paged_kv_indices[rows], call.paged_k_cache.shape[1]
        length = 0
        if len(pages):
            length = (len(pages) - 1) * page_size + int(call.paged_kv_last_page_len[b])
        caches = (call.paged_k_cache, call.paged_v_cache)
        keys.append(tuple(pages_of(cache, pages, length) for cache in caches))
    _write(call, queries, keys, mask_mode)


def _write(call: Any, queries: list[slice], keys: list[tuple[Tensor, ...]], mask_mode: int) -> None:
    """Attend, and leave out and LSE where the wrapper wants them."""
    demand(call.window_left == -1, f"a window of {call.window_left}")
    demand(mask_mode in (_NON_CAUSAL, _CAUSAL, _CUSTOM), f"mask mode {mask_mode}")
    requests = []
    for b, (rows, (k, v)) in enumerate(zip(queries, keys, strict=True)):
        visible = None
        if mask_mode == _CUSTOM:
            count = (rows.stop - rows.start) * len(k)
            first = int(call.maybe_mask_indptr[b])
            bits = call.maybe_custom_mask[first : first + -(-count // 8)]
            bits = bits[:, None] >> torch.arange(8, dtype=torch.uint8) & 1
            visible = bits.flatten()[:count].bool().view(-1, len(k))
        requests.append(Request(rows, k.float(), v.float(), mask_mode == _CAUSAL, visible))
    out, lse = attend(call.q.float(), requests, scale=call.sm_scale, logit_cap=call.logits_soft_cap)
    call.o.copy_(out)
    if call.maybe_lse is not None:
        call.maybe_lse.copy_(lse / math.log(2))


def _check_heads(q: Tensor, k: Tensor, plan: Plan) -> None:
    demand(q.dtype in FLOATS and k.dtype in (*FLOATS, *_FP8), f"q {q.dtype}, k {k.dtype}")
    found, planned = (q.shape[1], k.shape[-2]), (plan.heads, plan.kv_heads)
    demand(found == planned, f"planned for (heads, kv heads) {planned}, run with {found}")
    demand(q.stride(-1) == k.stride(-1) == 1, "gaps along the last dimension")


def _same(what: str, found: Tensor, planned: list[int] | None) -> None:
    """The kernel's work was dealt out on the host, by lengths that must be those on the device."""
    demand(found.tolist() == planned, f"planned for {what} {planned}, run with {found.tolist()}")


class _Launched:
    """A Triton kernel of SGLang, which FlashInfer's MLA backend packs the slots of requests by."""

    def __getitem__(self, grid: object) -> Any:
        return self._pack

    @staticmethod
    @on_the_device
    def _pack(
        req_to_token: Tensor,
        requests: Tensor,
        lens: Tensor,
        indptr: Tensor,
        starts: Tensor | None,
        out: Tensor,
        *_: Any,
        **__: Any,
    ) -> None:
        demand(starts is None, "the stand-in packs whole requests")
        for request, length, first in zip(
            requests.tolist(), lens.tolist(), indptr.tolist(), strict=False
        ):
            out[first : first + length] = req_to_token[request, :length]


@on_the_device
def segment_packbits(x: Tensor, indptr: Tensor, bitorder: str = "big") -> tuple[Tensor, Tensor]:
    """Eight bools a byte, each request from a byte of its own; and where these begin, int32."""
    demand(bitorder == "little", f"bits in {bitorder} order")
    weights = 2 ** torch.arange(8)
    parts = []
    for rows in spans(indptr):
        bits = torch.nn.functional.pad(x[rows].long(), (0, -(rows.stop - rows.start) % 8))
        parts.append((bits.view(-1, 8) * weights).sum(1).to(torch.uint8))
    starts = torch.tensor([0, *(len(part) for part in parts)]).cumsum(0)
    return torch.cat(parts), starts.to(torch.int32)


class MLAWrapper:
    """``BatchMLAPagedAttentionWrapper``, with its metadata as prefix sums."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        _real_mla("__init__").bind(self, *args, **kwargs)
        self._buffers = {
            name: kwargs[name]
            for name in ("qo_indptr", "kv_indptr", "kv_indices")
            if name in kwargs
        }
        self._planned: Any = None

    def plan(self, *args: Any, **kwargs: Any) -> None:
        """Remember what is to be attended; copies to the host, as the real one does."""
        call = SimpleNamespace(**_real_mla("plan").bind(self, *args, **kwargs).arguments)
        demand_int32(
            qo=call.qo_indptr, kv=call.kv_indptr, ids=call.kv_indices, lens=call.kv_len_arr
        )
        lens = (call.kv_indptr[1:] - call.kv_indptr[:-1]).cpu()
        demand(torch.equal(lens, call.kv_len_arr.cpu()), "lengths that are not the prefix sums'")
        self._planned = call

    @on_the_device
    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Out [T, H, 512] in q's dtype, with its base-2 LSE [T, H] where asked."""
        call = SimpleNamespace(return_lse=False, out=None)
        call.__dict__.update(_real_mla("run").bind(self, *args, **kwargs).arguments)
        plan = self._planned
        q = torch.cat([call.q_nope, call.q_pe], -1)
        demand(q.shape[1] == plan.num_heads, f"planned for {plan.num_heads} heads: {q.shape}")
        demand(q.dtype == call.ckv_cache.dtype, f"q {q.dtype}, cache {call.ckv_cache.dtype}")
        rows = torch.cat([call.ckv_cache, call.kpe_cache], -1)
        rows = rows.view(-1, plan.page_size, 1, rows.shape[-1])
        requests = []
        for queries, keys in zip(spans(plan.qo_indptr), spans(plan.kv_indptr), strict=True):
            k = pages_of(rows, plan.kv_indices[keys], keys.stop - keys.start).float()
            v = k[..., : plan.head_dim_ckv]
            requests.append(Request(queries, k, v, bool(plan.causal)))
        out, lse = attend(q.float(), requests, scale=plan.sm_scale)
        out = out.to(q.dtype) if call.out is None else call.out.copy_(out)
        return (out, lse / math.log(2)) if call.return_lse else out


def _real_mla(method: str) -> inspect.Signature:
    from flashinfer.mla import BatchMLAPagedAttentionWrapper

    return inspect.signature(inspect.unwrap(getattr(BatchMLAPagedAttentionWrapper, method)))
