"""The adapters that read page tables, on stand-ins for their kernels."""

import math
import pkgutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from sglang_cpu_reference import stand_ins
from sglang_cpu_reference.checkpoints import make_checkpoint
from sglang_helix.srt.layers.attention import adapters
from sglang_helix.srt.layers.attention.torch_native_backend import partial_attention
from sglang_helix.srt.layers.dcp.ownership import KVShard
from srt.expected import check
from srt.fresh import Fresh
from srt.models.serving import serve
from srt.models.test_models import BATCHES, NEW_TOKENS
from srt.slots import Slots
from torch.utils._python_dispatch import TorchDispatchMode

# Heads that the kernels exist for: latent ones are attended whole in prefill.
WIDTHS: dict[str, dict[str, int]] = {
    "llama": {},
    "deepseek_v2": {"qk_nope_head_dim": 128, "v_head_dim": 128, "num_hidden_layers": 2},
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {
        family: make_checkpoint(family, root / family, **widths)
        for family, widths in WIDTHS.items()
    }


@pytest.mark.parametrize(
    ("backend", "family", "tp", "layout", "page"),
    [
        ("fa3", "llama", 2, ("--dcp-size", "2", "--dcp-comm-backend", "a2a"), 1),
        ("fa3", "llama", 4, ("--attn-tp-size", "1", "--dcp-comm-backend", "ag_rs"), 16),
        ("fa3", "deepseek_v2", 2, ("--dcp-size", "2", "--dcp-comm-backend", "ag_rs"), 1),
        ("fa3", "deepseek_v2", 4, ("--attn-tp-size", "1", "--dcp-comm-backend", "a2a"), 8),
        ("fa4", "llama", 2, ("--dcp-size", "2", "--dcp-comm-backend", "a2a"), 16),
    ],
)
def test_equals_transformers(
    kernels: Fresh,
    checkpoints: dict[str, Path],
    backend: str,
    family: str,
    tp: int,
    layout: tuple[str, ...],
    page: int,
) -> None:
    sizes = ("--page-size", str(page), "--chunked-prefill-size", "80", "--max-total-tokens", "512")
    flags = ("--attention-backend", backend, *layout, *sizes)
    for report in serve(kernels, checkpoints[family], tp, flags, BATCHES, NEW_TOKENS):
        for prompts, answers in zip(BATCHES, report.answers, strict=True):
            for tokens, answer in zip(prompts, answers, strict=True):
                check(checkpoints[family], tokens, answer, NEW_TOKENS)
        assert report.answers[-1][0].cached_tokens > 0


class NoSync(TorchDispatchMode):
    """Raises where the host would wait for the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket not in (
            torch.ops.aten._local_scalar_dense,
            torch.ops.aten.nonzero,
        )
        return func(*args, **(kwargs or {}))


RANKS, HEADS = 3, 6
PAGE = 16  # which every one of them takes
LENGTHS = dict(enumerate((1, 2, 3, 40, 17, 64)))


class Heads(NamedTuple):
    """Key-value heads; the widths of keys and of values, which are a part of the keys for MLA."""

    kv: int
    k_width: int
    v_width: int
    mla: bool


GQA, MLA = Heads(2, 16, 16, False), Heads(1, 288, 256, True)


def adapter_of(name: str, heads: Heads, **attributes: Any) -> tuple[Any, Any]:
    """An adapter on its stand-ins, without a model, and a layer of it."""
    stand_ins.install([name])
    adapter = object.__new__(pkgutil.resolve_name(adapters.adapter(name).gqa[0]))
    adapter.__dict__.update(
        mla=heads.mla,
        pool_page_size=PAGE,
        page_size=PAGE,
        device="cpu",
        max_context_len=max(LENGTHS.values()),
        num_splits=0,
        fa_impl_ver=4 if name == "fa4" else 3,
        kv_cache_dtype_str="auto",
        group_kv_heads=heads.kv,
        head_dim=heads.k_width,
        q_dtype=torch.float32,
        zeroed_workspace=torch.zeros(1, dtype=torch.uint8),
        counters=torch.zeros(1, dtype=torch.uint8),
        **attributes,
    )
    layer = SimpleNamespace(
        layer_id=0,
        tp_q_head_num=HEADS,
        tp_k_head_num=heads.kv,
        tp_v_head_num=heads.kv,
        head_dim=heads.k_width,
        qk_head_dim=heads.k_width,
        v_head_dim=heads.v_width,
        scaling=heads.k_width**-0.5,
        logit_cap=0.0,
        k_scale=None,
    )
    return adapter, layer


def replayed(rank: int, name: str, heads: Heads) -> list[float]:
    """Errors of one rank's decode by the metadata of a capture, refreshed for other batches."""
    slots = Slots(RANKS, PAGE, pages=40)
    shard = KVShard(RANKS, rank)
    keys = torch.full((RANKS * slots.rows, heads.kv, heads.k_width), torch.nan)
    values = torch.full((RANKS * slots.rows, heads.kv, heads.v_width), torch.nan)
    if heads.mla:
        values = keys[..., : heads.v_width]
    rows = {}
    for request, length in LENGTHS.items():
        slots.extend(request, length)
        rows[request] = shard.read_rows(torch.tensor(slots.of[request]))
        for part in (values, keys):
            part[rows[request]] = torch.randn_like(part[rows[request]])
    adapter, layer = adapter_of(
        name,
        heads,
        shard=shard,
        req_to_token_pool=SimpleNamespace(req_to_token=slots.table()),
        token_to_kv_pool=SimpleNamespace(
            get_kv_buffer=lambda layer: (keys, values), get_key_buffer=lambda layer: keys
        ),
    )

    def batch(requests: list[int], size: int) -> Any:
        """As a replay brings it: padded requests are number 0, one token long, without a slot."""
        padding = [0] * (size - len(requests))
        return SimpleNamespace(
            batch_size=size,
            req_pool_indices=torch.tensor(requests + padding),
            seq_lens=torch.tensor([LENGTHS[r] for r in requests] + [1] * len(padding)),
            out_cache_loc=torch.tensor([slots.of[r][-1] for r in requests], dtype=torch.int64),
        )

    adapter.init_cuda_graph_state(8, 8)
    adapter.init_forward_metadata_out_graph(batch([], 4), in_capture=True)
    read = ("pages", "cu_q", "read_lens", "write_rows")
    captured = {part: getattr(adapter, part, None) for part in read}
    width = captured["pages"].table.shape[1]
    assert width == -(-max(LENGTHS.values()) // (RANKS * PAGE)), "as wide as a rank needs"
    errors = []
    for requests in ([3, 0, 5, 4], [1, 4], [5, 2, 0]):
        replay = batch(requests, 4)
        with NoSync():
            adapter.init_forward_metadata_out_graph(replay)
        adapter.__dict__.update(captured)  # what the graph reads
        q = torch.randn(4, HEADS, heads.k_width)
        parts = q.split([heads.v_width, heads.k_width - heads.v_width], -1) if heads.mla else q
        out, lse = adapter.partial_decode(parts, layer, replay)
        if adapters.adapter(name).base2:
            lse = lse * math.log(2)
        for row, request in enumerate(requests):
            own = rows[request]
            want = partial_attention(q[row, None], keys[own], values[own], scale=layer.scaling)
            if not len(own):
                assert lse[row].isneginf().all()
                continue
            errors.append(float((out[row] - want.out[0]).norm()))
            errors.append(float((lse[row] - want.lse[0]).norm()))
        if not heads.mla:
            ends = [slots.of[r][-1] for r in requests]
            wanted = {slot // RANKS for slot in ends if slot % RANKS == rank}
            assert {row for row in adapter.write_rows.tolist() if row >= PAGE} == wanted
    return errors


@pytest.mark.parametrize(
    ("name", "heads"),
    [("fa3", GQA), ("fa3", MLA), ("fa4", GQA), ("fa4", MLA), ("trtllm_mha", GQA)],
    ids=lambda part: ("MLA" if part.mla else "GQA") if isinstance(part, Heads) else part,
)
def test_captured_metadata_is_refreshed_in_place(fresh: Fresh, name: str, heads: Heads) -> None:
    for rank in range(RANKS):
        errors = fresh.value(replayed, rank, name, heads)
        assert len(errors) >= 12
        assert max(errors) < 1e-4


def quantized() -> float:
    """Error of a decode from an fp8 cache with scales, by `fa3`, whose queries are fp8 then too."""
    dtype = torch.float8_e4m3fn
    scales = {"k_scale": torch.tensor(0.05), "v_scale": torch.tensor(0.02)}
    lens = torch.tensor([3, 9])
    slots = Slots(1, PAGE, pages=9)
    for request, length in enumerate(lens.tolist()):
        slots.extend(request, length)
    k, v = (torch.randn(slots.rows, GQA.kv, GQA.k_width) for _ in range(2))
    k, v = ((x / scales[f"{n}_scale"]).to(dtype) for x, n in ((k, "k"), (v, "v")))
    adapter, layer = adapter_of(
        "fa3", GQA, token_to_kv_pool=SimpleNamespace(get_kv_buffer=lambda layer: (k, v))
    )
    layer.__dict__.update(scales)
    adapter.__dict__.update(kv_cache_dtype_str="fp8_e4m3", kv_cache_dtype=dtype, max_q=1)
    adapter.__dict__.update(kv_cache_is_mxfp8=False, shard=KVShard(1, 0))
    adapter.cu_q = torch.arange(3, dtype=torch.int32)
    adapter.pages = adapter.allocate_pages(2, 64)
    adapter.pages.table[:, :3] = slots.table()[:, :9:PAGE] // PAGE
    adapter.pages.lens.copy_(lens)
    q = torch.randn(2, HEADS, GQA.k_width)
    out, lse = adapter.partial_decode(q, layer, None)
    errors = []
    for row, length in enumerate(lens.tolist()):
        rows = torch.tensor(slots.of[row][:length])
        keys, values = (x[rows].float() * scales[n] for x, n in ((k, "k_scale"), (v, "v_scale")))
        query = q[row, None].to(dtype)
        want = partial_attention(query, keys, values, scale=layer.scaling)
        # The kernel's output is bf16.
        errors.append(float((out[row].float() - want.out[0]).norm() / want.out.norm()) / 10)
        errors.append(float((lse[row] - want.lse[0]).norm()))
    return max(errors)


def test_scales_of_an_fp8_cache(fresh: Fresh) -> None:
    assert fresh.value(quantized) < 1e-3


def drafts_seen(name: str) -> float:
    """Error of a verify pass's own part: trees of drafts, each seeing its ancestors and itself."""
    adapter, layer = adapter_of(name, GQA)
    count, cached = 4, (1, 5, 9)
    mode = SimpleNamespace(is_target_verify=lambda: True)
    below = torch.ones(count, count, dtype=torch.bool).tril(-1)
    trees = [
        (below & (torch.rand(count, count) < 0.5)) | torch.eye(count, dtype=torch.bool)
        for _ in cached
    ]
    masks = [
        torch.cat([torch.ones(count, length, dtype=torch.bool), tree], 1).flatten()
        for length, tree in zip(cached, trees, strict=True)
    ]
    batch = SimpleNamespace(
        forward_mode=mode,
        seq_lens=torch.tensor(cached),
        spec_info=SimpleNamespace(custom_mask=torch.cat(masks)),
    )
    adapter.max_q = count
    q = torch.randn(len(cached) * count, HEADS, GQA.k_width)
    k, v = torch.randn(2, len(q), GQA.kv, GQA.k_width)
    out, lse = adapter.partial_current(q, k, v, layer, batch)
    whole = torch.block_diag(*(tree.float() for tree in trees)).bool()
    want = partial_attention(q, k, v, scale=layer.scaling, visible=whole)
    return max(float((out - want.out).norm()), float((lse - want.lse).norm()))


@pytest.mark.parametrize("name", ["fa3", "fa4"])
def test_drafts_see_their_own_tree(fresh: Fresh, name: str) -> None:
    assert fresh.value(drafts_seen, name) < 1e-4
