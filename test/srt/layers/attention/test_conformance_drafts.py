"""Every adapter's verify pass, eager and captured, against unsharded attention in float64."""

import itertools
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.speculative.spec_info import SpecInputType
from sglang_helix.srt.layers.attention.adapters import Attention, adapter
from sglang_helix.srt.layers.dcp import comm
from sglang_helix.srt.layers.dcp.ownership import KVShard
from srt.fresh import Fresh
from srt.layers.attention import steps, test_verify
from srt.layers.attention.conformance import (
    CASES,
    NARROW,
    REQUESTS,
    VERIFIED,
    NoSync,
    as_captured,
    build,
    parallel,
    prepare,
)
from srt.layers.attention.steps import Heads, Step
from srt.slots import Slots
from srt.threads import ThreadGroup, run_threads


def verify_failures(backend: str, attention: Attention) -> list[str]:
    """Trees of drafts, as `test_verify.py` has the torch reference attend them."""
    prepare(backend)
    test_verify.backend_of = lambda *args, **kwargs: build(backend, *args, **kwargs)
    mla, page = attention == "MLA", (adapter(backend).pages or (4,))[0]
    cases = NARROW[attention] if backend == "triton" else CASES[attention][:2]
    if backend == "triton" and not mla:
        # Drafts of 4 heads on each key-value head are no whole tiles of decode's kernel.
        cases = [*cases, (2, Heads(8, 2, 16, 16))]
    wrong = []
    for (ranks, heads), (name, parents) in itertools.product(cases, test_verify.TREES.items()):
        drafts = page, parents, mla
        found = run_threads(test_verify.verify_on_rank, ranks, heads, *drafts, **parallel(ranks))
        tokens = steps.random_tokens(heads, 0, mla)
        wanted = torch.stack(
            [
                test_verify.expected(tokens, request, row.nonzero().flatten())
                for request in test_verify.CACHED
                for row in test_verify.ancestry(parents)
            ]
        )
        error = float((torch.cat(found, dim=1).double() - wanted).norm() / wanted.norm())
        if not error < 1e-5:
            wrong.append(f"{ranks} ranks, {heads}, {name}: {error:.1e}")
    return wrong


@pytest.mark.parametrize(("backend", "attention"), VERIFIED)
def test_drafts_attend_their_ancestors_and_the_prefix(
    process: Fresh, backend: str, attention: Attention
) -> None:
    assert process.value(verify_failures, backend, attention) == []


def captured_drafts_on_rank(
    rank: int,
    group: ThreadGroup,
    backend: str,
    heads: Heads,
    page: int,
    mla: bool,
    parents: tuple[int, ...],
) -> tuple[list[int], torch.Tensor]:
    """A verify graph is captured for padding alone, and replayed for fewer requests than it has.

    Masks come as draft models leave them, and as n-grams do. Padding reads page 0, which is NaN
    again before each replay.

    Returns the requests of all replays and their outputs, [requests * drafts, own heads, Dv].
    """
    tokens, slots = steps.random_tokens(heads, 0, mla), Slots(group.world_size, page, 300)
    drafts, own, latent = len(parents) + 1, heads.queries // group.world_size, heads.v_width
    adapter_ = build(backend, rank, group, heads, slots, mla)
    layer = steps.layer_of(heads.queries if mla else own, heads.kv, heads)
    seen_by = test_verify.ancestry(parents)

    def of(order: list[tuple[int, int]]) -> list[torch.Tensor]:
        return [torch.stack([part[r, t] for r, t in order]) for part in tokens]

    batch, order = steps.forward_batch(Step("extend", test_verify.CACHED), slots)
    _, k, v = of(order)
    adapter_.req_to_token_pool.req_to_token = slots.table()
    if mla:
        adapter_._store_mla(layer, batch, k[..., :latent], k[..., latent:])
    else:
        adapter_.prepare_writes(batch)
        adapter_._store(layer, batch, k, v)

    def replayed(requests: list[int], drafted: SpecInputType) -> Any:
        brought = [slots.extend(request, drafts) for request in requests]
        adapter_.req_to_token_pool.req_to_token = slots.table()
        padding = 4 - len(requests)
        lens = torch.tensor([test_verify.CACHED[r] for r in requests] + [1] * padding)
        masks = [
            torch.cat([seen_by.new_ones(drafts, length), seen_by], 1).flatten()
            for length in lens.tolist()[: len(requests) or 4]  # of those that are not padding
        ]
        mask = torch.cat(masks)
        if drafted == SpecInputType.EAGLE_VERIFY:
            # As SGLang does: written where the backend has it, without columns of cached tokens.
            mask = adapter_.verify_mask.buffer
            mask.fill_(True)
            mask[: len(requests) * drafts**2] = seen_by.flatten().repeat(len(requests))
        return SimpleNamespace(
            forward_mode=ForwardMode.TARGET_VERIFY,
            batch_size=4,
            req_pool_indices=torch.tensor(requests + [REQUESTS - 1] * padding),
            seq_lens=lens,
            seq_lens_cpu=lens.clone(),
            out_cache_loc=torch.tensor([*itertools.chain(*brought)], dtype=torch.int64),
            out_cache_loc_is_physical=False,
            extend_prefix_lens_cpu=None,
            kv_loc_plan=None,
            encoder_lens=None,
            spec_info=SimpleNamespace(
                spec_input_type=drafted,
                draft_token_num=drafts,
                num_tokens_per_req=drafts,
                custom_mask=mask,
            ),
        )

    adapter_.init_cuda_graph_state(8, 8 * drafts)
    ngram, eagle = SpecInputType.NGRAM_VERIFY, SpecInputType.EAGLE_VERIFY
    of_padding = replayed([], eagle)
    adapter_.init_forward_metadata_out_graph(of_padding, in_capture=True)
    adapter_.init_forward_metadata_in_graph(as_captured(of_padding, drafts))
    captured = dict(vars(adapter_))
    asked, outputs = [], []
    for requests, drafted in (([2, 0], eagle), ([1], ngram)):
        batch = replayed(requests, drafted)
        for part in (adapter_.token_to_kv_pool.keys, adapter_.token_to_kv_pool.values):
            part[:page] = torch.nan
        # FlashInfer's plans of n-grams ask the device, for which their step waits anyway.
        asks = backend == "flashinfer" and drafted == ngram
        with nullcontext() if asks else NoSync.over(batch, adapter_):
            adapter_.init_forward_metadata_out_graph(batch)
        vars(adapter_).update(captured)  # what the graph reads
        in_graph = as_captured(batch, drafts)
        with NoSync.over(in_graph, adapter_):
            adapter_.init_forward_metadata_in_graph(in_graph)
        real = [(r, test_verify.CACHED[r] + n) for r in requests for n in range(drafts)]
        q, k, v = of(real + [(0, 0)] * (4 * drafts - len(real)))
        padded = torch.zeros(4 * drafts, dtype=torch.int64)
        padded[: len(real)] = batch.out_cache_loc
        batch.out_cache_loc = padded
        if mla:
            parts = {"q_rope": q[..., latent:], "k_rope": k[..., latent:]}
            latents = k[..., :latent]
            partial = adapter_.forward_extend(
                q[..., :latent], latents, latents, layer, batch, **parts
            )
            out = comm.dcp_a2a_lse_reduce(
                lambda *_: None, *partial, group, is_lse_base_on_e=not adapter_.base2
            )
        else:
            mine = q[:, own * rank : own * (rank + 1)].flatten(1)
            out = adapter_.forward_extend(mine, k, v, layer, batch).view(len(q), own, latent)
        outputs.append(out[: len(real)])
        asked += requests
        # What stands in a row is what was written to it: padding went nowhere else.
        shard, pool = KVShard(group.world_size, rank), adapter_.token_to_kv_pool
        for request in requests:
            for position, slot in enumerate(slots.of[request]):
                if slot % shard.size == shard.rank:
                    kept = pool.get_key_buffer(0)[slot // shard.size]
                    assert torch.equal(kept, tokens.k[request, position]), (request, position)
    return asked, torch.cat(outputs)


def captured_drafts_error(backend: str, attention: Attention) -> float:
    """The norm of what is wrong, beside that of what is right."""
    prepare(backend, speculative_algorithm="NGRAM", speculative_num_draft_tokens=5)
    mla, page = attention == "MLA", (adapter(backend).pages or (4,))[0]
    widths = (288, 256) if backend == "triton" else (576, 512)  # as in NARROW
    heads = Heads(6, 1, *widths) if mla else Heads(6, 2, 16, 16)
    parents = test_verify.TREES["branches"]
    given = backend, heads, page, mla, parents
    found = run_threads(captured_drafts_on_rank, 3, *given, **parallel(3))
    tokens = steps.random_tokens(heads, 0, mla)
    wanted = torch.stack(
        [
            test_verify.expected(tokens, request, row.nonzero().flatten())
            for request in found[0][0]
            for row in test_verify.ancestry(parents)
        ]
    )
    got = torch.cat([outputs for _, outputs in found], dim=1).double()
    return float((got - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(
    ("backend", "attention"),
    [case for case in VERIFIED if case[1] in adapter(case[0]).drafts_in_graphs],
)
def test_captured_drafts_attend_their_ancestors_and_the_prefix(
    process: Fresh, backend: str, attention: Attention
) -> None:
    assert process.value(captured_drafts_error, backend, attention) < 1e-5
