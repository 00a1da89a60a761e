"""Speculative decoding's bookkeeping, upstream Triton and sgl-kernel kernels, in plain torch.

What n-gram drafts and draft models with greedy acceptance need, and no more. How a draft model
attends: `draft_attention`.
"""

import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

_OPS = "sglang.kernels.ops.speculative"
#: `--speculative-algorithm` values served here, beside NGRAM, which asks no platform.
ALGORITHMS = frozenset({"EAGLE", "EAGLE3", "STANDALONE"})


def install() -> None:
    """Stand in for the module that SGLang imports off accelerators, which needs a GPU driver."""
    module = ModuleType("sgl_kernel.speculative")
    module.__dict__["reconstruct_indices_from_tree_mask"] = reconstruct_indices_from_tree_mask
    sys.modules[module.__name__] = module


def reconstruct_indices_from_tree_mask(
    tree_mask: Tensor,
    verified_seq_len: Tensor,
    positions: Tensor,
    retrieve_index: Tensor,
    retrieve_next_token: Tensor,
    retrieve_next_sibling: Tensor,
    batch_size: int,
    draft_token_num: int,
) -> None:
    """Positions and links of B trees of n nodes, from their masks.

    tree_mask bool [B * n * n]: whether node j is node i or an ancestor of it. Written, int64:
    positions [B * n], the committed length plus the depth; retrieve_index [B, n], the node's place
    in the batch; retrieve_next_token and retrieve_next_sibling [B, n], first child and next
    sibling, -1 where there is none.
    """
    n = draft_token_num
    above = tree_mask.view(batch_size, n, n).tril(-1)
    positions.copy_((above.sum(-1) + verified_seq_len[:, None]).flatten())
    retrieve_index.copy_(torch.arange(batch_size * n).view(batch_size, n))
    retrieve_next_token.fill_(-1)
    retrieve_next_sibling.fill_(-1)
    for tree in range(batch_size):
        last_child: dict[int, int] = {}
        for node in range(1, n):
            ancestors = above[tree, node].nonzero().flatten()
            if not len(ancestors):
                continue
            parent = int(ancestors[-1])
            if parent in last_child:
                retrieve_next_sibling[tree, last_child[parent]] = node
            else:
                retrieve_next_token[tree, parent] = node
            last_child[parent] = node


def build_tree(
    parent_list: Tensor,
    top_scores_index: Tensor,
    seq_lens: Tensor,
    tree_mask: Tensor,
    positions: Tensor,
    retrieve_index: Tensor,
    retrieve_next_token: Tensor,
    retrieve_next_sibling: Tensor,
    topk: int,
    spec_steps: int,
    num_verify_tokens: int,
    tree_mask_mode: Any,
) -> None:
    """B trees of n nodes, each a root and the n - 1 drafts that scored highest.

    top_scores_index [B, n - 1], rising: which candidates these are. Candidates come in families of
    topk: those of family f are children of candidate parent_list[f], the first family's of the
    root. Written: tree_mask, the nodes' own columns of a mask over cached tokens and nodes, or of
    one over nodes alone; the others as in `reconstruct_indices_from_tree_mask`.
    """
    n = num_verify_tokens
    visible = torch.eye(n, dtype=torch.bool).repeat(len(seq_lens), 1, 1)
    for own, candidates, parents in zip(
        visible, top_scores_index.tolist(), parent_list.tolist(), strict=True
    ):
        for node, candidate in enumerate(candidates, start=1):
            family = candidate // topk
            parent = candidates.index(parents[family]) + 1 if family else 0
            own[node] |= own[parent]
    reconstruct_indices_from_tree_mask(
        visible.flatten(),
        seq_lens,
        positions,
        retrieve_index,
        retrieve_next_token,
        retrieve_next_sibling,
        len(seq_lens),
        n,
    )
    whole = tree_mask_mode == tree_mask_mode.FULL_MASK
    begin = 0
    for own, cached in zip(
        visible, seq_lens.tolist() if whole else [0] * len(seq_lens), strict=True
    ):
        end = begin + n * (cached + n)
        tree_mask[begin:end].view(n, -1)[:, cached:] = own
        begin = end


def verify_tree_greedy(
    predicts: Tensor,
    accept_index: Tensor,
    accept_token_num: Tensor,
    candidates: Tensor,
    retrieve_index: Tensor,
    retrieve_next_token: Tensor,
    retrieve_next_sibling: Tensor,
    target_predict: Tensor,
    topk: int = -1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Walk each tree along the model's own choices, as far as the drafts agree.

    candidates, target_predict and the links [B, n]. Written: predicts [B * n], the model's choice
    at each accepted node; accept_index [B, depth], the accepted nodes' places, -1 after them;
    accept_token_num [B], how many drafts were right.
    """
    for tree in range(len(candidates)):
        node, accepted = 0, [0]
        while True:
            choice = target_predict[tree, node]
            child = int(retrieve_next_token[tree, node])
            while child >= 0 and candidates[tree, child] != choice:
                child = int(retrieve_next_sibling[tree, child])
            if child < 0 or len(accepted) == accept_index.shape[1]:
                break
            node = child
            accepted.append(node)
        places = retrieve_index[tree, accepted]
        predicts[places] = target_predict[tree, accepted].to(predicts.dtype)
        accept_index[tree, : len(accepted)] = places.to(accept_index.dtype)
        accept_token_num[tree] = len(accepted) - 1
    return predicts, accept_index, accept_token_num


def extend_cache_locs(
    *,
    req_pool_indices: Tensor,
    req_to_token: Tensor,
    start_offset: Tensor,
    end_offset: Tensor,
    **_sizes: Any,
) -> Tensor:
    """Slots of each request's tokens start_offset to end_offset, int64, one after the other."""
    windows = zip(req_pool_indices, start_offset, end_offset, strict=True)
    return torch.cat([req_to_token[row, start:end] for row, start, end in windows]).long()


def _write_slots(
    req_pool_indices: Tensor,
    req_to_token: Tensor,
    start_offset: Tensor,
    end_offset: Tensor,
    out_cache_loc: Tensor,
    batch_size: int,
) -> None:
    """The opposite of `extend_cache_locs`."""
    lens = (end_offset - start_offset).tolist()
    slots = out_cache_loc[: sum(lens)].split(lens)
    for row, start, end, own in zip(req_pool_indices, start_offset, end_offset, slots, strict=True):
        req_to_token[row, start:end] = own.to(req_to_token.dtype)


def _draft_slots(
    req_pool_indices: Tensor,
    req_to_token: Tensor,
    seq_lens: Tensor,
    out_cache_loc: Tensor,
    topk: int,
    num_cols: int,
    positions: None = None,
    mrope: None = None,
) -> None:
    """Slots of each request's topk * num_cols tokens behind its cached ones."""
    assert positions is None, "written on CUDA alone"
    columns = seq_lens[:, None] + torch.arange(topk * num_cols)
    out_cache_loc.copy_(req_to_token[req_pool_indices[:, None], columns].flatten())


def _last_slots(
    req_to_token: Tensor, req_pool_indices_tensor: Tensor, prefix_lens_tensor: Tensor
) -> Tensor:
    """Each request's last slot, -1 where it has none; a kernel beside most attention backends."""
    from sglang.srt.mem_cache.allocation import get_last_loc_torch

    return get_last_loc_torch(req_to_token, req_pool_indices_tensor, prefix_lens_tensor)


def _bonus_tokens(
    accept_tokens: Tensor, accept_lens: Tensor, bonus_tokens: Tensor, accept_stride: int, size: int
) -> None:
    """Each request's last accepted token: the model's own, behind its right drafts."""
    last = accept_lens.long()[:, None] - 1
    bonus_tokens.copy_(accept_tokens.view(size, accept_stride).gather(1, last).flatten())


def _uncompiled(original: Callable[..., Any], *args: Any) -> Any:
    """A function under ``torch.compile``, as it is."""
    return inspect.unwrap(original)(*args)


def _create_decode_backend(original: Callable[[Any], Any], factory: Any) -> Any:
    """What a draft model decodes with; None where its one step decodes nothing."""
    if not _is_torch_native(factory):
        return original(factory)
    from sglang_cpu_reference.draft_attention import TorchMultiStepDraftBackend

    steps = factory.speculative_num_steps
    if steps <= 1:
        return None
    return TorchMultiStepDraftBackend(factory.draft_model_runner, factory.topk, steps)


def _create_draft_extend_backend(original: Callable[[Any], Any], factory: Any) -> Any:
    """What a draft model reads accepted tokens with; None: what it reads prompts with."""
    return None if _is_torch_native(factory) else original(factory)


def _is_torch_native(factory: Any) -> bool:
    from sglang.srt.runtime_context import attention_backends

    named = factory.draft_attn_backend
    return ({named} if named else set(attention_backends())) == {"torch_native"}


def _nothing_to_wait_for(device: Any = None) -> None:
    """``torch.cuda.synchronize``, which models call when they share weights with their draft."""


def _front_slots(num_front: Tensor, out_cache_loc: Tensor, front_out_cache_loc: Tensor) -> None:
    """The first num_front [B] slots of each request's window, one after the other."""
    windows = out_cache_loc.view(len(num_front), -1)
    front = torch.cat([own[:count] for own, count in zip(windows, num_front, strict=True)])
    front_out_cache_loc[: len(front)] = front


def _accepted_slots(
    accept_index: Tensor, out_cache_loc: Tensor, accept_out_cache_loc: Tensor, size: int
) -> None:
    """The slots that accept_index names, -1 left out, one after the other."""
    named = accept_index.flatten()
    named = named[named >= 0].long()
    accept_out_cache_loc[: len(named)] = out_cache_loc[named]


def _nothing_to_compile(pool: Any) -> None:
    """A pool's preparation of the kernel that moves rows."""


def _move_rows(pool: Any, tgt_loc: Tensor, src_loc: Tensor) -> None:
    """Rows src_loc of every layer's keys and values to rows tgt_loc, as if all at once."""
    for buffer in (*pool.k_buffer, *pool.v_buffer):
        buffer[tgt_loc] = buffer[src_loc]


_POOL = "sglang.srt.mem_cache.memory_pool.MHATokenToKVPool"
REPLACED: dict[str, Callable[..., Any]] = {
    f"{_OPS}.spec_tree.verify_tree_greedy_func": verify_tree_greedy,
    f"{_OPS}.cache_locs.fill_front_out_cache_loc_func": _front_slots,
    f"{_OPS}.eagle.fill_accept_out_cache_loc_func": _accepted_slots,
    f"{_OPS}.spec_tree.build_tree_kernel_efficient_func": build_tree,
    f"{_OPS}.cache_locs.assign_draft_cache_locs_contiguous_func": _draft_slots,
    f"{_OPS}.eagle.fill_bonus_tokens_func": _bonus_tokens,
    "torch.cuda.synchronize": _nothing_to_wait_for,
    "sglang.srt.mem_cache.allocation.get_last_loc": _last_slots,
    f"{_POOL}._init_kv_copy_and_warmup": _nothing_to_compile,
    f"{_POOL}._move_kv_cache_impl": _move_rows,
    "sglang.srt.mem_cache.allocation.assign_req_to_token_pool_func": _write_slots,
}
_FACTORY = "sglang.srt.speculative.draft_utils.DraftBackendFactory"
AROUND: dict[str, Callable[..., Any]] = {
    "sglang.srt.speculative.spec_utils._select_top_k_tokens_later": _uncompiled,
    f"{_FACTORY}.create_decode_backend": _create_decode_backend,
    f"{_FACTORY}.create_draft_extend_backend": _create_draft_extend_backend,
}
