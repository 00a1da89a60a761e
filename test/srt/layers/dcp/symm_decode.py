"""Ranks that attend over their own tokens and exchange by one kernel, one rank after the other.

All ranks send before any receives: they are threads, of which one runs at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from sglang_helix.srt.layers.attention.kv_splits import BLOCK, Scratch, SplitPlan, Tile
from sglang_helix.srt.layers.attention.triton_backend import ShardedTritonAttnBackend
from sglang_helix.srt.layers.dcp import symm_launch
from sglang_helix.srt.layers.dcp.exchange import Exchanger
from sglang_helix.srt.layers.dcp.ownership import KVShard
from sglang_helix.srt.layers.dcp.partial import Partial, Splits
from sglang_helix.srt.layers.dcp.symm import RECEIVE, SEND
from sglang_helix.srt.layers.dcp.symm_layout import Layout, QueryLayout
from srt.interpreter import DEVICE
from srt.layers.dcp.symm_ranks import Ranks as Workspaces
from srt.threads import TIMEOUT, run_threads


class Turns:
    """A rank's kernel that sends, and receives once all have sent; or one `phase` alone."""

    def __init__(self, workspace: Any) -> None:
        self.workspace = workspace
        self.phase: Any = None
        self.all_have_sent: Callable[[], None] = lambda: None  # waits for it
        self.max_tokens = workspace.layout.max_tokens

    def in_turn(self, launched: Callable[[Any], Any]) -> Any:
        """What the last phase of launched(phase) returns."""
        if self.phase is not None:
            return launched(self.phase)
        launched(SEND)
        self.all_have_sent()
        return launched(RECEIVE)


class PreparedGather(Turns):
    """Of queries."""

    calls = 0

    def __call__(self, parts: tuple[torch.Tensor, ...], layer: int) -> torch.Tensor:
        self.calls += 1
        gathered: torch.Tensor = self.in_turn(
            lambda phase: symm_launch.gather(self.workspace, parts, phase=phase)
        )
        return gathered


class Prepared(Turns):
    """A rank's prepared exchange."""

    def __init__(self, workspace: Any) -> None:
        super().__init__(workspace)
        self.forms: set[str] = set()

    def __call__(self, partial: Partial | Splits, layer: int, **options: Any) -> Partial:
        self.forms.add("splits" if isinstance(partial, Splits) else "rows")
        reduced: Partial = self.in_turn(
            lambda phase: symm_launch.exchange(self.workspace, partial, phase=phase, **options)
        )
        return reduced


class Ranks:
    """All ranks of a group; queries: widths of their parts, where a kernel gathers them."""

    def __init__(
        self,
        size: int,
        heads: int,
        width: int,
        dtype: torch.dtype,
        tokens: int = 6,
        queries: tuple[int, ...] = (),
    ) -> None:
        self.kernels = [
            Prepared(workspace)
            for workspace in Workspaces(Layout(size, heads, width, dtype, tokens), DEVICE).apart
        ]
        self.groups = [
            SimpleNamespace(unique_name=f"dcp:{rank}", world_size=size, rank_in_group=rank)
            for rank in range(size)
        ]
        for group, kernel in zip(self.groups, self.kernels, strict=True):
            group.exchanger = Exchanger("symm", group)
            group.exchanger._kernels[heads, width, dtype] = kernel
        self.gathers: list[PreparedGather] = []
        if queries:
            layout = QueryLayout(size, heads, queries, dtype, tokens)
            self.gathers = [PreparedGather(end) for end in Workspaces(layout, DEVICE).apart]
        for group, gather in zip(self.groups, self.gathers, strict=False):
            group.exchanger._gathers[heads, queries, dtype] = gather

    def play(self, step: Callable[[int, Any], torch.Tensor]) -> list[torch.Tensor]:
        """What step(rank, group), which gathers and exchanges in one order, returns on each."""
        turn, everyone = threading.Lock(), threading.Barrier(len(self.kernels))

        def all_have_sent() -> None:
            turn.release()
            try:
                everyone.wait(TIMEOUT)
            finally:
                turn.acquire()

        def played(rank: int, _group: Any) -> torch.Tensor:
            with turn:  # the interpreter runs one program at a time
                try:
                    return step(rank, self.groups[rank])
                except BaseException:
                    everyone.abort()
                    raise

        for kernel in (*self.kernels, *self.gathers):
            kernel.all_have_sent = all_have_sent
        return run_threads(played, len(self.kernels))


LENGTHS = (0, 1, 33, 200)


class Cache:
    """Keys and values of a few requests, of which a rank holds every size-th token.

    With a rope it is MLA's: one head, whose keys end with the rope and begin with the values.
    """

    def __init__(self, size: int, kv_heads: int, width: int, rope: int = 0) -> None:
        self.k, self.v = (
            [torch.randn(length, kv_heads, width + rope, device=DEVICE) for length in LENGTHS]
            for _ in range(2)
        )
        if rope:
            self.v = [k[..., :width] for k in self.k]
        self.size = size

    def attended(self, q: torch.Tensor) -> torch.Tensor:
        """[B, H, D] in float64; zero for a request without tokens."""
        rows = []
        for query, k, v in zip(q.double(), self.k, self.v, strict=True):
            group = q.shape[1] // k.shape[1]
            keys, values = (t.double().repeat_interleave(group, 1) for t in (k, v))
            logits = torch.einsum("hd,thd->ht", query, keys) * q.shape[-1] ** -0.5
            rows.append(torch.einsum("ht,thd->hd", logits.softmax(-1), values))
        return torch.stack(rows)

    def backend(self, rank: int, group: Any, heads: int, splits: int) -> ShardedTritonAttnBackend:
        own_k, own_v = ([t[rank :: self.size] for t in part] for part in (self.k, self.v))
        lens = torch.tensor([len(part) for part in own_k])
        B, D = len(lens), self.v[0].shape[-1]
        adapter = object.__new__(ShardedTritonAttnBackend)
        adapter.shard, adapter.kvp_group, adapter.heads = KVShard(self.size, rank), group, heads
        adapter.exchanger, adapter.base2 = group.exchanger, False
        adapter.mla = adapter.use_mla = self.k[0].shape != self.v[0].shape
        keys, values = torch.cat(own_k), torch.cat(own_v)
        adapter.token_to_kv_pool = SimpleNamespace(get_kv_buffer=lambda layer: (keys, values))
        indptr = torch.zeros(B + 1, dtype=torch.int32)
        indptr[1:] = lens.cumsum(0)
        plan = SplitPlan(heads, keys.shape[1], 1 << 20, BLOCK, splits, Tile())
        assert plan.capacity(B) == splits
        adapter.scratch = Scratch(plan, B, D, 0, DEVICE)
        # What no split writes holds anything: nothing of it may reach the result.
        adapter.scratch.out.fill_(float("nan"))
        adapter.scratch.lse.fill_(50.0)
        adapter.forward_metadata = SimpleNamespace(
            kv_indptr=indptr.to(DEVICE),
            kv_indices=torch.arange(len(keys), device=DEVICE),
            num_kv_splits=torch.tensor([1, splits, 2, splits], dtype=torch.int32, device=DEVICE),
        )
        return adapter


def attention_layer(heads: int, width: int, rope: int, v_scale: float) -> Any:
    return SimpleNamespace(
        tp_q_head_num=heads,
        qk_head_dim=width + rope,
        v_head_dim=width,
        scaling=(width + rope) ** -0.5,
        logit_cap=0.0,
        logit_capping_method="tanh",
        layer_id=0,
        k_scale=torch.tensor(1.0),
        v_scale=torch.tensor(v_scale),
        k_scale_float=1.0,
        v_scale_float=v_scale,
        xai_temperature_len=-1,
        sliding_window_size=-1,
    )
