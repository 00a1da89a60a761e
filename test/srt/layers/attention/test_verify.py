"""A verify pass over a sharded cache, by brute force: trees of draft tokens, several ranks."""

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.speculative.spec_info import SpecInputType
from sglang_helix.srt.layers.attention.drafts import fold, unfold
from sglang_helix.srt.layers.dcp import comm
from srt.layers.attention.steps import (  # noqa: F401 the fixture
    Heads,
    Step,
    Tokens,
    _ranks_are_threads,
    backend_of,
    forward_batch,
    layer_of,
    random_tokens,
)
from srt.slots import Slots
from srt.threads import ThreadGroup, run_threads

pytestmark = pytest.mark.quick

# Cached tokens of each request: fewer than ranks, and around a page.
CACHED = {0: 1, 1: 16, 2: 7}
# A chain, and a tree of two branches; parents of the drafts after the first.
TREES = {"chain": (0, 1, 2, 3), "branches": (0, 0, 1, 2)}


def ancestry(parents: tuple[int, ...]) -> torch.Tensor:
    """bool [n, n]: whether draft j is draft i or stands above it."""
    mask = torch.eye(len(parents) + 1, dtype=torch.bool)
    for child, parent in enumerate(parents, start=1):
        mask[child] |= mask[parent]
    return mask


def verify_on_rank(
    rank: int,
    group: ThreadGroup,
    heads: Heads,
    page: int,
    parents: tuple[int, ...],
    mla: bool = False,
) -> torch.Tensor:
    """Outputs of every draft token, [T, own heads, Dv]."""
    tokens, slots = random_tokens(heads, 0, mla), Slots(group.world_size, page, pages=300)
    backend = backend_of(rank, group, heads, slots, mla=mla)
    own, latent = heads.queries // group.world_size, heads.v_width
    layer = layer_of(heads.queries if mla else own, heads.kv, heads)

    def run(batch: Any, order: list[tuple[int, int]]) -> torch.Tensor:
        backend.req_to_token_pool.req_to_token = slots.table()
        q, k, v = (torch.stack([part[r, t] for r, t in order]) for part in tokens)
        if mla and not batch.forward_mode.is_target_verify():
            backend._store_mla(layer, batch, k[..., :latent], k[..., latent:])
            return q
        backend.init_forward_metadata(batch)
        if not mla:
            q = q[:, own * rank : own * (rank + 1)]
            return backend.forward_extend(q.flatten(1), k, v, layer, batch)
        parts = {"q_rope": q[..., latent:], "k_rope": k[..., latent:]}
        q, k = q[..., :latent], k[..., :latent]
        out, lse = backend.forward_extend(q, k, k, layer, batch, **parts)
        return comm.dcp_a2a_lse_reduce(
            lambda *_: None, out, lse, group, is_lse_base_on_e=not backend.base2
        )

    run(*forward_batch(Step("extend", CACHED), slots))
    drafts = len(parents) + 1
    batch, order = forward_batch(Step("extend", dict.fromkeys(CACHED, drafts)), slots)
    batch.forward_mode = ForwardMode.TARGET_VERIFY
    batch.seq_lens = batch.seq_lens - drafts
    batch.seq_lens_cpu = batch.seq_lens.clone()
    batch.extend_seq_lens_cpu = batch.extend_prefix_lens_cpu = None
    seen = ancestry(parents)
    masks = [torch.cat([seen.new_ones(drafts, n), seen], 1).flatten() for n in CACHED.values()]
    batch.spec_info = SimpleNamespace(
        spec_input_type=SpecInputType.NGRAM_VERIFY,
        draft_token_num=drafts,
        num_tokens_per_req=drafts,
        # Buffers of a captured size are longer than a batch.
        custom_mask=torch.cat([*masks, seen.new_ones(5)]),
    )
    return run(batch, order).view(len(order), own, heads.v_width)


def expected(tokens: Tokens, request: int, drafts: torch.Tensor) -> torch.Tensor:
    """One draft token over the cached tokens and the drafts it sees (the last one itself)."""
    cached = CACHED[request]
    visible = torch.cat([torch.arange(cached), cached + drafts])
    q = tokens.q[request, visible[-1]].double()
    k, v = (part[request, visible].double() for part in (tokens.k, tokens.v))
    group = q.shape[0] // k.shape[1]
    k, v = (part.repeat_interleave(group, dim=1) for part in (k, v))
    weights = torch.softmax(torch.einsum("hd,shd->hs", q, k) * q.shape[-1] ** -0.5, -1)
    return torch.einsum("hs,shd->hd", weights, v)


def test_drafts_are_more_heads_of_their_request() -> None:
    """Each still reads its own key-value head, and comes back to its place."""
    for heads, groups, drafts in itertools.product((2, 6, 8), (1, 2), (1, 3)):
        order = torch.arange(5 * drafts * heads).view(5 * drafts, heads, 1)
        folded = fold(order, drafts, groups)
        assert folded.shape == (5, drafts * heads, 1)
        for request, row in enumerate(folded[..., 0].tolist()):
            for place, number in enumerate(row):
                token, head = divmod(number, heads)
                assert token // drafts == request
                assert place // (drafts * heads // groups) == head // (heads // groups)
        assert torch.equal(unfold(folded, drafts, groups), order)


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize(
    ("ranks", "heads", "mla"),
    [
        (2, Heads(4, 1, 16, 16), False),
        (3, Heads(6, 2, 16, 24), False),
        (4, Heads(8, 8, 16, 16), False),
        (3, Heads(6, 1, 24, 16), True),
        (4, Heads(8, 1, 24, 16), True),
    ],
)
def test_drafts_attend_their_ancestors_and_the_prefix(
    ranks: int, heads: Heads, mla: bool, tree: str
) -> None:
    for page in (1, 4):
        found = run_threads(
            verify_on_rank,
            ranks,
            heads,
            page,
            TREES[tree],
            mla,
            tp_size=ranks,
            dcp_comm_backend="a2a",
        )
        tokens = random_tokens(heads, 0, mla)
        wanted = torch.stack(
            [
                expected(tokens, request, row.nonzero().flatten())
                for request in CACHED
                for row in ancestry(TREES[tree])
            ]
        )
        got = torch.cat(found, dim=1).double()
        assert (got - wanted).norm() < 1e-5 * wanted.norm()
