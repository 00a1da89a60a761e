"""Every adapter of the table, built by its own constructor on ranks that are threads.

Kernels are stand-ins, or Triton's in the interpreter. Pool rows are NaN until they are written.
"""

import os
import pkgutil
import sys
import threading
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import torch
from sglang_cpu_reference.stand_ins.kernel import on_the_device
from sglang_helix.srt.layers.attention import kv_splits
from sglang_helix.srt.layers.attention.adapters import ADAPTERS, Attention, adapter
from sglang_helix.srt.layers.dcp import planner
from sglang_helix.srt.layers.dcp.ownership import KVShard
from srt.layers.attention import steps
from srt.layers.attention.steps import Heads, LatentPool, Pool
from srt.slots import Slots
from srt.threads import ThreadGroup, get_parallel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from transformers import PretrainedConfig

CONTEXT = 128  # tokens of a request, at most
REQUESTS = 8

CASES: dict[Attention, list[tuple[int, Heads]]] = {
    # Ranks and heads, of widths that every kernel has: one key-value head, a few, groups that
    # ranks cut through, as many as queries.
    "GQA": [
        (2, Heads(4, 1, 16, 16)),
        (3, Heads(6, 2, 16, 16)),
        (4, Heads(8, 2, 64, 64)),
        (2, Heads(8, 8, 16, 16)),
    ],
    "MLA": [(2, Heads(4, 1, 576, 512)), (4, Heads(8, 1, 576, 512))],
}
# The interpreter is slow: of Triton's kernels one of each.
NARROW: dict[Attention, list[tuple[int, Heads]]] = {
    "GQA": [(2, Heads(6, 2, 16, 16))],
    "MLA": [(2, Heads(4, 1, 288, 256))],
}
OWN = [
    (record.name, attention)
    for record in ADAPTERS
    for attention in ("GQA", "MLA")
    if record.own_class(attention)
]
# The reference captures nothing.
CAPTURED = [(name, kind) for name, kind in OWN if name != "torch_native"]
# Elsewhere a cache in fp8 is refused at start-up.
QUANTIZED = [(name, kind) for name, kind in CAPTURED if kind not in adapter(name).no_fp8]
# Elsewhere drafts are refused at start-up, or SGLang's own.
VERIFIED = [
    (record.name, attention)
    for record in ADAPTERS
    for attention in ("GQA", "MLA")
    if record.own_class(attention, drafts=True) and attention not in record.no_drafts
]

# Modules in which a thread is a rank.
RANKED = ("sglang_helix.", "sglang.srt.layers.attention.", "sglang.srt.layers.dcp.")


class RequestTable:
    """SGLang's ReqToTokenPool: one tensor for ever, which backends may keep."""

    size = REQUESTS - 1

    def __init__(self) -> None:
        self._table = torch.zeros(REQUESTS, CONTEXT, dtype=torch.int32)

    @property
    def req_to_token(self) -> torch.Tensor:
        return self._table

    @req_to_token.setter
    def req_to_token(self, table: torch.Tensor) -> None:
        self._table[: table.shape[0], : table.shape[1]] = table


def build(
    backend: str,
    rank: int,
    group: ThreadGroup,
    heads: Heads,
    slots: Slots,
    mla: bool,
    dtype: torch.dtype = torch.float32,
    window: int = 0,
    of_model: torch.dtype = torch.float32,
) -> Any:
    """A rank's adapter, as SGLang would have it made; dtype is its cache's."""
    shard = KVShard(group.world_size, rank)
    pool = (LatentPool if mla else Pool)(slots.rows, shard, heads)
    pool.keys, pool.values = pool.keys.to(dtype), pool.values.to(dtype)
    name = adapter(backend).own_class("MLA" if mla else "GQA", drafts=True)
    kind = pkgutil.resolve_name(name)
    runner = runner_of(backend, slots.page // shard.size, pool, heads, mla, window, of_model)
    if backend == "triton":
        runner.decode_scratch = kv_splits.prepare(runner, REQUESTS, REQUESTS)
    return kind(runner)


def runner_of(
    backend: str,
    page_size: int,
    pool: Any,
    heads: Heads,
    mla: bool,
    window: int,
    dtype: torch.dtype,
) -> Any:
    """What a backend's constructor asks of its ModelRunner."""
    from sglang.srt.configs.model_config import AttentionArch
    from sglang.srt.layers.quantization.fp4_kv_cache_quant_method import UnquantizedKVCacheMethod
    from sglang.srt.mem_cache.kv_index_translator import KVIndexTranslator
    from sglang.srt.runtime_context import get_context

    pool.get_kv_cache_quant_method = UnquantizedKVCacheMethod
    pool.start_layer = 0
    requests = RequestTable()
    model = SimpleNamespace(
        attention_arch=AttentionArch.MLA if mla else AttentionArch.MHA,
        context_len=CONTEXT,
        head_dim=heads.k_width,
        v_head_dim=heads.v_width,
        swa_v_head_dim=heads.v_width,
        kv_lora_rank=heads.v_width,
        qk_nope_head_dim=heads.v_width,
        qk_rope_head_dim=heads.k_width - heads.v_width,
        scaling=heads.k_width**-0.5,
        num_attention_heads=heads.queries,
        get_max_num_attention_heads=lambda: heads.queries,
        get_num_kv_heads=lambda *_: heads.kv,
        hf_text_config=SimpleNamespace(num_attention_heads=heads.queries),
        hf_config=PretrainedConfig(architectures=["LlamaForCausalLM"]),
        is_encoder_decoder=False,
        linear_attn_registry_result=None,
        is_local_attention_model=False,
        is_multimodal=False,
        is_hybrid_swa=False,
        num_hidden_layers=1,
    )
    return SimpleNamespace(
        model_config=model,
        server_args=get_context().server_args,
        use_mla_backend=mla,
        page_size=page_size,
        max_running_requests=REQUESTS,
        device="cpu",
        gpu_id=0,
        dtype=dtype,
        kv_cache_dtype=pool.keys.dtype,
        kv_cache_dtype_str="auto" if pool.keys.dtype == dtype else "fp8_e4m3",
        req_to_token_pool=requests,
        token_to_kv_pool=pool,
        token_to_kv_pool_allocator=SimpleNamespace(get_kvcache=lambda: pool),
        kv_index_translator=KVIndexTranslator(
            req_to_token=requests.req_to_token,
            token_to_kv_pool_allocator=None,
            token_to_kv_pool=pool,
            page_size=page_size,
            device="cpu",
        ),
        prefill_attention_backend_str=backend,
        decode_attention_backend_str=backend,
        decode_num_tokens_per_req=lambda: 1,
        model=steps.model_of(heads, window),
        pre_model_load_memory=0.0,
        init_new_workspace=False,
        is_draft_worker=False,
        sliding_window_size=window - 1 if window else None,
        attention_chunk_size=None,
        spec_algorithm=SimpleNamespace(is_dspark=lambda: False, is_frozen_kv_mtp=lambda: False),
    )


def publish(backend: str, **flags: Any) -> None:
    """Resolved flags of a server with this backend, for constructors that ask for them."""
    from sglang.srt.runtime_context import SpawnRanks, publish
    from sglang.srt.server_args import ServerArgs

    publish(
        ServerArgs(
            model_path="dummy",
            attention_backend=backend,
            device="cpu",
            mem_fraction_static=0.5,
            **flags,
        ),
        role="scheduler",
        ranks=SpawnRanks(world_rank=0, gpu_id=0),
    )


def prepare(backend: str, **flags: Any) -> None:
    """In a process of its own: SGLang's backends can be built, and a thread is a rank."""
    publish(backend, **flags)
    for attention in ("GQA", "MLA"):
        if own := adapter(backend).own_class(attention, drafts=True):
            pkgutil.resolve_name(own)  # its module and upstream's are among those below
    for name, module in list(sys.modules.items()):
        if name.startswith(RANKED) and hasattr(module, "get_parallel"):
            module.get_parallel = get_parallel
    planner.get_attn_backend = lambda: steps.TRANSLATING
    if os.environ.get("TRITON_INTERPRET"):
        from triton.runtime.interpreter import GridExecutor

        # The interpreter plays one launch at a time: its state is the module's own.
        launch, turn = GridExecutor.__call__, threading.Lock()

        @on_the_device
        def in_turn(*args: Any, **kwargs: Any) -> None:
            with turn:
                launch(*args, **kwargs)

        GridExecutor.__call__ = in_turn


def parallel(ranks: int, exchange: str = "a2a") -> dict[str, Any]:
    """What a thread's `get_parallel` answers, beside its rank."""
    return {
        "tp_size": ranks,
        "attn_tp_size": ranks,
        "attn_cp_size": 1,
        "attn_dp_enabled": False,
        "enable_prefill_cp": False,
        "dcp_comm_backend": exchange,
    }


def as_captured(batch: Any, width: int = 1) -> Any:
    """A batch as its graph sees it: SGLang pads the slots with 0 where the graph reads them."""
    slots = torch.zeros(batch.batch_size * width, dtype=torch.int64)
    slots[: len(batch.out_cache_loc)] = batch.out_cache_loc
    return SimpleNamespace(**{**vars(batch), "out_cache_loc": slots})


class NoSync(TorchFunctionMode):
    """Raises where the host would wait for the device, or copy from it.

    On a CPU all memory is the host's: a batch's lengths, requests and slots count as the device's,
    and so does whatever is computed from them. What a kernel does stays unseen.
    """

    _COPIES = ("cpu", "item", "tolist", "numpy", "nonzero", "unique", "__bool__", "__int__")
    _COPIES += ("__index__", "__float__", "__iter__", "__contains__")
    WAITS = tuple(getattr(torch.Tensor, name) for name in _COPIES)

    def __init__(self, *on_the_device: torch.Tensor) -> None:
        super().__init__()
        self._there: dict[int, torch.UntypedStorage] = {}  # kept, so that no address is used again
        self._take(on_the_device)

    @classmethod
    def over(cls, batch: Any, adapter_: Any) -> "NoSync":
        """What a batch and the table of its requests bring of the device."""
        parts = [part for name, part in vars(batch).items() if not name.endswith("_cpu")]
        parts = [part for part in parts if isinstance(part, torch.Tensor)]
        return cls(*parts, adapter_.req_to_token_pool.req_to_token)

    def _take(self, tensors: Iterable[torch.Tensor]) -> None:
        for tensor in tensors:
            if tensor.device.type == "cpu" and (address := tensor.untyped_storage().data_ptr()):
                self._there[address] = tensor.untyped_storage()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        there = any(x.untyped_storage().data_ptr() in self._there for x in given)
        assert not (there and func in self.WAITS), f"{func} waits for the device"
        result = func(*args, **(kwargs or {}))
        if there:
            self._take(x for x in tree_leaves(result) if isinstance(x, torch.Tensor))
        return result
