"""The `fa3` adapter in SGLang's schedulers, on stand-ins for its kernels, against transformers."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang_cpu_reference import stand_ins
from sglang_cpu_reference.checkpoints import make_checkpoint
from sglang_helix.srt.layers.dcp.ownership import KVShard
from srt.fresh import Fresh
from srt.models.serving import _serve, command_line
from srt.models.test_models import BATCHES, NEW_TOKENS
from srt.slots import Slots
from srt.test_end_to_end import check
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


def with_stand_ins(rank: int, *args: Any) -> Any:
    stand_ins.install(["fa3"])  # the platform's own call was before the fork
    return _serve(rank, *args)


@pytest.mark.parametrize(
    ("family", "tp", "layout", "page"),
    [
        ("llama", 2, ("--dcp-size", "2", "--dcp-comm-backend", "a2a"), 1),
        ("llama", 4, ("--attn-tp-size", "1", "--dcp-comm-backend", "ag_rs"), 16),
        ("deepseek_v2", 2, ("--dcp-size", "2", "--dcp-comm-backend", "ag_rs"), 1),
        ("deepseek_v2", 4, ("--attn-tp-size", "1", "--dcp-comm-backend", "a2a"), 8),
    ],
)
def test_equals_transformers(
    ready: Fresh,
    checkpoints: dict[str, Path],
    family: str,
    tp: int,
    layout: tuple[str, ...],
    page: int,
) -> None:
    sizes = ("--page-size", str(page), "--chunked-prefill-size", "80", "--max-total-tokens", "512")
    flags = ("--attention-backend", "fa3", *layout, *sizes)
    argv = command_line(checkpoints[family], tp, *flags)
    for report in ready.ranks(with_stand_ins, tp, argv, BATCHES, NEW_TOKENS):
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


RANKS, PAGE, HEADS, KV_HEADS, WIDTH = 3, 4, 6, 2, 16


def replayed(rank: int) -> list[float]:
    """Errors of one rank's decode by the metadata of a capture, refreshed for other batches."""
    stand_ins.install(["fa3"])
    from sglang_helix.srt.layers.attention import flashattention_backend
    from sglang_helix.srt.layers.attention.torch_native_backend import partial_attention

    slots = Slots(RANKS, PAGE, pages=40)
    lengths = dict(enumerate((1, 2, 3, 40, 17, 64)))
    for request, length in lengths.items():
        slots.extend(request, length)
    keys, values = (torch.full((slots.rows, KV_HEADS, WIDTH), torch.nan) for _ in range(2))
    shard = KVShard(RANKS, rank)
    for request, length in lengths.items():
        rows = shard.read_rows(torch.tensor(slots.of[request][:length]))
        keys[rows], values[rows] = torch.randn(2, len(rows), KV_HEADS, WIDTH)
    adapter = object.__new__(flashattention_backend.ShardedFlashAttentionBackend)
    adapter.__dict__.update(
        shard=shard,
        pool_page_size=PAGE,
        page_size=PAGE,
        mla=False,
        device="cpu",
        max_context_len=64,
        num_splits=0,
        fa_impl_ver=3,
        kv_cache_dtype_str="auto",
        kv_cache_is_mxfp8=False,
        req_to_token_pool=SimpleNamespace(req_to_token=slots.table()),
        token_to_kv_pool=SimpleNamespace(get_kv_buffer=lambda layer: (keys, values)),
    )
    layer = SimpleNamespace(
        layer_id=0,
        tp_k_head_num=KV_HEADS,
        tp_v_head_num=KV_HEADS,
        head_dim=WIDTH,
        qk_head_dim=WIDTH,
        v_head_dim=WIDTH,
        scaling=WIDTH**-0.5,
        logit_cap=0.0,
        k_scale=None,
    )

    def batch(requests: list[int], size: int) -> Any:
        """As a replay brings it: padded requests are number 0, one token long, without a slot."""
        padding = [0] * (size - len(requests))
        return SimpleNamespace(
            batch_size=size,
            req_pool_indices=torch.tensor(requests + padding),
            seq_lens=torch.tensor([lengths[r] for r in requests] + [1] * len(padding)),
            out_cache_loc=torch.tensor([slots.of[r][-1] for r in requests], dtype=torch.int64),
        )

    adapter.init_cuda_graph_state(8, 8)
    adapter.init_forward_metadata_out_graph(batch([], 4), in_capture=True)
    captured = adapter.pages, adapter.cu_q, adapter.write_rows
    assert adapter.pages.table.shape[1] == -(-64 // (RANKS * PAGE)), "as wide as a rank needs"
    errors = []
    for requests in ([3, 0, 5, 4], [1, 4], [5, 2, 0]):
        replay = batch(requests, 4)
        with NoSync():
            adapter.init_forward_metadata_out_graph(replay)
        adapter.pages, adapter.cu_q, adapter.write_rows = captured  # what the graph reads
        q = torch.randn(4, HEADS, WIDTH)
        out, lse = adapter.partial_decode(q, layer, replay)
        for row, request in enumerate(requests):
            rows = shard.read_rows(torch.tensor(slots.of[request][: lengths[request]]))
            want = partial_attention(q[row : row + 1], keys[rows], values[rows], scale=WIDTH**-0.5)
            assert torch.equal(lse[row].isneginf(), want.lse[0].isneginf())
            seen = not want.lse.isneginf().any()
            errors.append(float((out[row] - want.out[0]).norm()) if seen else 0.0)
            errors.append(float((lse[row] - want.lse[0]).norm()) if seen else 0.0)
        owned = [slots.of[r][-1] for r in requests if slots.of[r][-1] % RANKS == rank]
        wanted = {slot // RANKS for slot in owned}
        assert {row for row in adapter.write_rows.tolist() if row >= PAGE} == wanted
    return errors


@pytest.mark.parametrize("rank", range(RANKS))
def test_captured_metadata_is_refreshed_in_place(fresh: Fresh, rank: int) -> None:
    errors = fresh.value(replayed, rank)
    assert len(errors) == 18
    assert max(errors) < 1e-5
