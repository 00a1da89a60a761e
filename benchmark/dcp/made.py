"""`sglang.launch_server` whose long prompts find a context in the cache that nobody computed.

For `serve --prefix made`, whose --launcher this is. A request that arrives gets cache rows for all
of its prompt but the end, as if an earlier request had prefilled it, and the cache is filled with
random numbers once. Decode then reads and writes what it would in a real load, so its speed can be
measured at a million tokens without hours of prefill; the tokens mean nothing.

Of random weights (`--load-format dummy`) experts' correction biases are made zero, so that tokens
choose experts of their own.
"""

from __future__ import annotations

import runpy
from typing import Any

COMPUTED = 16  # tokens: prompts up to here are prefilled, and so is the end of longer ones


def make_context(scheduler: Any, req: Any, is_retracted: bool = False) -> None:
    """Before `Scheduler._add_request_to_queue`: what it does is the same on every rank."""
    import torch
    from sglang.srt.mem_cache.base_prefix_cache import InsertParams, MatchPrefixParams
    from sglang.srt.mem_cache.common import evict_from_tree_cache
    from sglang.srt.mem_cache.radix_cache import RadixKey
    from sglang_helix.srt.managers.scheduler import draft_runner

    tree, allocator = scheduler.tree_cache, scheduler.token_to_kv_pool_allocator
    tokens = (len(req.origin_input_ids) - 1) // tree.page_size * tree.page_size
    if tokens <= COMPUTED:
        return
    # Beside a draft model the tree's keys are pairs of tokens: one token more for as many slots.
    ahead = int(scheduler.spec_algorithm.is_eagle())
    key = RadixKey(req.origin_input_ids[: tokens + ahead], req.extra_key)
    found = tree.match_prefix(MatchPrefixParams(key=key)).device_prefix_len
    if found == tokens:
        return
    evict_from_tree_cache(tree, tokens - found)
    slots = allocator.alloc(tokens - found)
    if slots is None:  # then it is prefilled, and the benchmark says that it was
        return
    if not hasattr(scheduler, "_helix_filled"):
        scheduler._helix_filled = True
        fill(allocator.get_kvcache())
        if draft := draft_runner(scheduler):
            fill(draft.token_to_kv_pool)
    # The tree keeps its own slots of what it has, and is told not to free those given for it.
    slots = torch.cat([slots.new_zeros(found), slots])
    given = InsertParams(key=key, value=slots, prev_prefix_len=found)
    if states := getattr(scheduler.req_to_token_pool, "mamba_allocator", None):
        given.mamba_value = state_slot(tree, states)
    if tree.insert(given).mamba_exist:
        states.free(given.mamba_value)


def state_slot(tree: Any, states: Any) -> Any:
    """A slot of a recurrent state, [1], for what a hybrid model remembers of the context: zeros."""
    from sglang.srt.mem_cache.base_prefix_cache import EvictParams

    slot = states.alloc(1)
    if slot is None:
        tree.evict_for_alloc(EvictParams(num_tokens=0, mamba_num=1))
        slot = states.alloc(1)
    return slot


def fill(pool: Any) -> None:
    """Random numbers into every row: zeros would take a GPU less time and power."""
    import torch

    pool = getattr(pool, "full_kv_pool", pool)  # a hybrid's, of its attention layers alone
    for layer in range(pool.start_layer, pool.start_layer + pool.layer_num):
        for buffer in (pool.get_key_buffer(layer), pool.get_value_buffer(layer)):
            for rows in buffer.split(1 << 18):
                rows.copy_(torch.randn(rows.shape, dtype=torch.float32, device=rows.device))


def even_out_experts(result: None, model: Any) -> None:
    """After `initialize_dummy_weights`: what is added to a router's scores (noaux_tc) becomes 0.

    A trained one has experts chosen equally often. A random one does the opposite: SGLang draws
    all weights from +-1e-3, of which scores, sums of products of two, spread a hundredth as far,
    so that every token chooses the experts of the largest biases. A batch then reads the weights
    of one token's experts, and its time is none of a real load.
    """
    for name, parameter in model.state_dict().items():
        if name.endswith(("correction_bias", "expert_bias")):
            parameter.zero_()


def register() -> None:
    """Hand the hooks to SGLang, which applies them when it loads its plugins."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    target = "sglang.srt.managers.scheduler.Scheduler._add_request_to_queue"
    HookRegistry.register(target, make_context, HookType.BEFORE)
    target = "sglang.srt.model_loader.loader.initialize_dummy_weights"
    HookRegistry.register(target, even_out_experts, HookType.AFTER)


# Schedulers are spawned, and spawning runs the main module again under this name.
if __name__ == "__mp_main__":
    register()
if __name__ == "__main__":
    runpy.run_module("sglang.launch_server", run_name="__main__")
