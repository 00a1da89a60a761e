"""The way from attention through the one-kernel exchange, and the result.

Where there is no GPU the kernels run in Triton's interpreter, in a process of its own.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang_helix.srt.layers.dcp import comm
from sglang_helix.srt.layers.dcp.lse_combine import combine_splits
from sglang_helix.srt.layers.dcp.symm import SEND
from sglang_helix.srt.models.value_projection import own_values
from srt.fresh import Fresh
from srt.interpreter import DEVICE, kernels, passes, without_a_gpu
from srt.layers.dcp.symm_decode import LENGTHS, Cache, Ranks, attention_layer
from srt.layers.dcp.symm_ranks import expected, poison, relative_error
from srt.threads import get_parallel

from benchmark.dcp import measure


@without_a_gpu
def test_interpreter(interpreted: Fresh) -> None:
    passes(interpreted, __file__, "-m", "gpu")


@kernels
@pytest.mark.parametrize("size", [2, 4])
def test_latents_come_heads_first(size: int) -> None:
    """MLA's merge function: base 2 or natural, any strides, [own heads, B, D] in one piece."""
    B, H, D = 3, 8, 64
    ranks = Ranks(size, H, D, torch.float32)
    x = torch.randn(H, size * B, D, device=DEVICE).transpose(0, 1)
    lse = torch.randn(size * B, H, device=DEVICE) * 3
    poison(x, lse)
    want, _ = expected(x, lse, size)
    for base_e in (True, False):
        own = lse if base_e else lse / torch.tensor(2.0).log()
        results = ranks.play(
            lambda rank, group, own=own, base_e=base_e: comm.cp_lse_ag_out_rs_mla(
                x.chunk(size)[rank], own.chunk(size)[rank], group, is_lse_base_on_e=base_e
            )
        )
        assert all(result.is_contiguous() for result in results)
        assert relative_error(torch.cat(results).transpose(0, 1), want) < 2e-6


@kernels
@pytest.mark.parametrize("size", [2, 4])
def test_values_are_projected_before_they_leave(size: int) -> None:
    """MLA's rows in base 2 or natural, some of them empty and holding anything."""
    B, H, D, V = 3, 8, 64, 16
    ranks = Ranks(size, H, V, torch.float32)
    x = torch.randn(size * B, H, D, device=DEVICE)
    lse = torch.randn(size * B, H, device=DEVICE) * 3
    w_vc = torch.randn(H, V, D, device=DEVICE).transpose(1, 2)  # as models hold it
    poison(x, lse)
    want = torch.einsum("bhd,hdv->bhv", expected(x, lse, size)[0], w_vc.double())
    for base2 in (False, True):
        own = lse / torch.tensor(2.0).log() if base2 else lse
        results = ranks.play(
            lambda rank, group, own=own, base2=base2: own_values(
                x.chunk(size)[rank].flatten(1), own.chunk(size)[rank], w_vc, group.exchanger, base2
            )
        )
        assert relative_error(torch.cat(results, 1), want.flatten(1)) < 2e-6
        assert {form for kernel in ranks.kernels for form in kernel.forms} == {"rows"}


@kernels
@pytest.mark.parametrize("splits", [4, 9])
def test_splits_are_merged_and_projected_before_they_leave(splits: int) -> None:
    """Of Triton's decode of MLA."""
    size, heads, width, rope, value = 2, 8, 512, 64, 128
    ranks = Ranks(size, heads, value, torch.float32)
    cache = Cache(size, 1, width, rope)
    q = torch.randn(len(LENGTHS), heads, width + rope, device=DEVICE)
    w_vc = torch.randn(heads, width, value, device=DEVICE)
    layer = attention_layer(heads, width, rope, 1.0)
    backends = [
        cache.backend(rank, group, heads, splits) for rank, group in enumerate(ranks.groups)
    ]

    def step(rank: int, group: Any) -> torch.Tensor:
        given = backends[rank].forward_decode(
            q[..., :width],
            *(None, None, layer, SimpleNamespace()),
            save_kv_cache=False,
            q_rope=q[..., width:],
            k_rope=None,
        )
        # Base 2 would be that of another backend's LSE.
        return own_values(*given, w_vc, group.exchanger, base2=True)

    want = torch.einsum("bhd,hdv->bhv", cache.attended(q), w_vc.double()).flatten(1)
    results = torch.cat(ranks.play(step), dim=1)
    assert not results[0].any()
    assert relative_error(results, want) < (5e-6 if DEVICE == "cpu" else 5e-3)


@kernels
@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "rope", "v_scale", "splits"),
    [
        (8, 2, 16, 0, 1.0, 4),
        (4, 4, 16, 0, 0.5, 4),
        (8, 1, 512, 64, 1.0, 4),
        (8, 2, 16, 0, 0.5, 9),
        (8, 1, 512, 64, 1.0, 9),
    ],
)
def test_splits_leave_for_their_owners(
    heads: int,
    kv_heads: int,
    width: int,
    rope: int,
    v_scale: float,
    splits: int,
) -> None:
    """A whole decode step: attention's first stage, then one launch (two for many splits)."""
    size = 2
    ranks = Ranks(size, heads, width, torch.float32)
    cache = Cache(size, kv_heads, width, rope)
    q = torch.randn(len(LENGTHS), heads, width + rope, device=DEVICE)
    layer = attention_layer(heads, width, rope, v_scale)
    backends = [
        cache.backend(rank, group, heads, splits) for rank, group in enumerate(ranks.groups)
    ]

    def step(rank: int, group: Any) -> torch.Tensor:
        def decode(q: torch.Tensor, **parts: torch.Tensor | None) -> Any:
            return backends[rank].forward_decode(
                q, None, None, layer, SimpleNamespace(), save_kv_cache=False, **parts
            )

        if not rope:
            return decode(q.flatten(1)).view(len(q), heads // size, width)
        # As the model does: it shapes the output, passes on the LSE, and multiplies heads first.
        out, lse = decode(q[..., :width], q_rope=q[..., width:], k_rope=None)
        merged = comm.cp_lse_ag_out_rs_mla(
            out.view(-1, heads, width), lse, group, is_lse_base_on_e=True
        )
        assert merged.is_contiguous()
        return merged.transpose(0, 1).view(-1, heads // size, width)

    want = cache.attended(q) * v_scale
    results = torch.cat(ranks.play(step), dim=1)
    assert not results[0].any()
    # On a GPU the first stage multiplies in TF32.
    assert relative_error(results, want) < (5e-6 if DEVICE == "cpu" else 5e-3)
    if DEVICE == "cuda":
        ranks.kernels[0].phase = SEND  # no rank answers now
        launches = measure.launches(lambda: step(0, ranks.groups[0]))
        # The two parts of MLA's query lie as they are attended.
        merged_first = 0 if splits <= 8 else 1
        assert launches - merged_first == 2, "attention's first stage, and the exchange"

    # The same through the merge that other exchanges take.
    partials = [
        combine_splits(backend.partial_decode(q, layer, SimpleNamespace()), torch.float32)
        for backend in backends
    ]
    merged, _ = expected(
        torch.cat([out for out, _ in partials]), torch.cat([lse for _, lse in partials]), 2
    )
    assert relative_error(results, merged) < 5e-6


@kernels
@pytest.mark.parametrize(("size", "rope"), [(3, 0), (2, 64)])
def test_queries_come_by_a_kernel_too(
    monkeypatch: pytest.MonkeyPatch, size: int, rope: int
) -> None:
    """Decode of GQA and MLA from a rank's own queries, two layers one after the other."""
    heads, width = 2 * size, 512 if rope else 16
    ranks = Ranks(size, heads, width, torch.float32, queries=(width, rope) if rope else (width,))
    cache = Cache(size, 1, width, rope)
    q = torch.randn(len(LENGTHS), heads, width + rope, device=DEVICE)
    backends = [cache.backend(rank, group, heads, 4) for rank, group in enumerate(ranks.groups)]
    layer = attention_layer(heads if rope else heads // size, width, rope, 1.0)
    monkeypatch.setattr(comm, "get_parallel", get_parallel)

    def step(rank: int, group: Any) -> torch.Tensor:
        own, given = q.chunk(size, dim=1)[rank], {}
        get_parallel().dcp_group = group
        query = own.flatten(1)
        if rope:
            latents, ropes = own[..., :width], own[..., width:]
            query, given["q_rope"] = comm.all_gather_q_for_mla_decode(latents, ropes)
            given["k_rope"] = None
        attended = backends[rank].forward_decode(
            query, None, None, layer, SimpleNamespace(), save_kv_cache=False, **given
        )
        if not rope:
            return attended.view(len(q), heads // size, width)
        out, lse = attended
        merged = comm.cp_lse_ag_out_rs_mla(out, lse, group, is_lse_base_on_e=True)
        return merged.transpose(0, 1)

    want = cache.attended(q)
    results = ranks.play(lambda rank, group: torch.stack([step(rank, group) for _ in range(2)]))
    for result in torch.cat(results, dim=2):
        assert relative_error(result, want) < (5e-6 if DEVICE == "cpu" else 5e-3)
    assert [gather.calls for gather in ranks.gathers] == [2] * size


@kernels
@pytest.mark.parametrize("splits", [4, 9])
@pytest.mark.parametrize(
    ("size", "heads", "kv_heads"), [(2, 8, 2), (2, 4, 4), (2, 8, 1), (4, 8, 2), (3, 6, 2)]
)
def test_drafts_over_their_prefix_leave_for_their_owners(
    size: int, heads: int, kv_heads: int, splits: int
) -> None:
    """The prefix part of a verify pass: decode's first stage over heads and drafts, one exchange.

    Few splits are reduced by it, as decode's are. Where heads of one key-value head are cut between
    ranks, and whole groups of them are not, they are merged first.
    """
    width, drafts, B = 16, 3, len(LENGTHS)
    ranks = Ranks(size, heads, width, torch.float32, drafts * B)
    cache = Cache(size, kv_heads, width)
    q = torch.randn(B, drafts, heads, width, device=DEVICE)
    layer = attention_layer(heads, width, 0, 1.0)
    layer.tp_k_head_num = kv_heads
    batch = SimpleNamespace(forward_mode=ForwardMode.TARGET_VERIFY)
    backends = []
    for rank, group in enumerate(ranks.groups):
        backend = cache.backend(rank, group, heads * drafts, splits)
        backend.heads, backend.drafts = heads, drafts
        backends.append(backend)

    def step(rank: int, group: Any) -> torch.Tensor:
        backend = backends[rank]
        return backend._own_heads(
            backend.partial_prefix(q.flatten(0, 1), layer, batch), torch.float32
        ).out

    want = torch.stack([cache.attended(q[:, draft]) for draft in range(drafts)], 1)
    results = torch.cat(ranks.play(step), dim=1)
    assert not results[:drafts].any()  # of the request without tokens
    assert relative_error(results, want.flatten(0, 1)) < (5e-6 if DEVICE == "cpu" else 5e-3)
    irregular = size == 3
    reduced = splits == 4 and not irregular
    forms = {"splits"} if reduced else {"rows"}
    assert {form for kernel in ranks.kernels for form in kernel.forms} == forms
    if DEVICE == "cuda":
        ranks.kernels[0].phase = SEND  # no rank answers now
        launches = measure.launches(lambda: step(0, ranks.groups[0]))
        copies = 3  # queries, and this rank's outputs and LSEs in another order
        merged = 0 if reduced else 1
        assert launches - copies - merged <= 2, "attention's first stage, and the exchange"
