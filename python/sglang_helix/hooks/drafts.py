"""Hooks: draft models of speculative decoding."""

from __future__ import annotations

from sglang_helix.hook import Hook

_SRT = "sglang_helix.srt"

DRAFTS: tuple[Hook, ...] = (
    Hook(
        target="sglang.srt.speculative.spec_utils.draft_tp_context",
        kind="around",
        stage="serve",
        impl=f"{_SRT}.speculative.spec_utils:draft_tp_context",
        signature="layout",
        why="drafts would read the KVP group: cut heads, and a whole cache by owner",
        how="no group for what runs inside; MLA of the series' adapters as upstream's take it",
        upstream="sgl-project/sglang#31785",
        until="upstream's drafts read a topology of their own",
    ),
    Hook(
        target="sglang.srt.model_executor.model_runner.ModelRunner.forward",
        kind="before",
        stage="serve",
        impl=f"{_SRT}.speculative.spec_utils:check_scope",
        signature="self, forward_batch, skip_attn_backend_init=, pp_proxy_tensors=, "
        "reinit_attn_backend=, split_forward_count=",
        why="a draft outside the scope, or the target inside, would read wrong rows silently",
        how="stops the rank with an error",
        upstream="none",
        until="see draft_tp_context",
    ),
    Hook(
        target="sglang.srt.model_executor.pool_configurator.DefaultPoolConfigurator.__init__",
        kind="after",
        stage="serve",
        impl=f"{_SRT}.model_executor.pool_configurator:count_draft",
        signature="self, kvc",
        why="counts a draft layer as a sharded one of the target's: too little memory by K - 1 "
        "layers of MLA, and by the heads of others",
        how="counts the draft's own heads and widths, for the tokens of all ranks",
        upstream="sgl-project/sglang#31785",
        until="upstream counts replicated drafts of every kind, as it does DSA's",
    ),
    Hook(
        target="sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator._init_pools",
        kind="after",
        stage="serve",
        impl=f"{_SRT}.mem_cache.kv_cache_configurator:mark_replicated",
        signature="self, sizes, req_to_token_pool, token_to_kv_pool_allocator",
        why="only the pool of DSA drafts says that it is whole",
        how="every pool of a draft says so; kinds that were never tried are refused",
        upstream="sgl-project/sglang#31785",
        until="upstream marks every draft's pool",
    ),
    Hook(
        target="sglang.srt.layers.attention.triton_backend.TritonMultiStepDraftBackend.__init__",
        kind="after",
        stage="serve",
        impl=f"{_SRT}.layers.attention.triton_backend:draft_pages",
        signature="self, model_runner, topk, speculative_num_steps",
        why="reads the branches of a tree by --page-size, though they lie in pages K times as "
        "long: drafts of other tokens",
        how="reads them by the allocator's page size",
        upstream="none",
        until="upstream asks the allocator",
    ),
)
