"""Hooks: prefill and decode on servers of their own."""

from __future__ import annotations

from sglang_helix.hook import Hook

_SRT = "sglang_helix.srt"
_MOONCAKE = "sglang.srt.disaggregation.mooncake.conn"

DISAGGREGATION: tuple[Hook, ...] = (
    *(
        Hook(
            target=f"sglang.srt.mem_cache.memory_pool.MHATokenToKVPool.{name}",
            kind="around",
            stage="serve",
            impl=f"{_SRT}.mem_cache.memory_pool:{name}",
            signature=f"self, {arguments}, mamba_indices=, req_pool_index=",
            why="keeps a retracted request's rows by widened slots, beyond the pool's end",
            how="keeps the rows that this rank owns",
            upstream="none",
            until="upstream's K/V pool keeps its own share, as MLA's does",
        )
        for name, arguments in (
            ("get_cpu_copy", "indices"),
            ("load_cpu_copy", "kv_cache_cpu, indices"),
        )
    ),
    Hook(
        target=f"{_MOONCAKE}.MooncakeKVManager.register_to_bootstrap",
        kind="before",
        stage="transfer",
        impl=f"{_SRT}.disaggregation.mooncake.conn:mark_layout",
        signature="self",
        why="a decode server cannot tell whether a prefill server would end at its layout",
        how="registers K beside what SGLang registers",
        upstream="none",
        until="upstream registers K, and its servers send K and V by owner",
    ),
    Hook(
        target=f"{_MOONCAKE}.MooncakeKVManager.try_ensure_parallel_info",
        kind="around",
        stage="transfer",
        impl=f"{_SRT}.disaggregation.mooncake.conn:try_ensure_parallel_info",
        signature="self, bootstrap_addr",
        why="a decode server that shards K and V ends there",
        how="asks the prefill ranks that hold the heads, K decode ranks each of them",
        upstream="none",
        until="upstream sends K and V by owner",
    ),
    Hook(
        target=f"{_MOONCAKE}.MooncakeKVReceiver.init",
        kind="around",
        stage="transfer",
        impl=f"{_SRT}.disaggregation.mooncake.conn:init_receiver",
        signature="self, prefill_dp_rank",
        why="a prefill server without the series would end its thread at such a decode server",
        how="ends the request with the reason",
        upstream="none",
        until="see try_ensure_parallel_info",
    ),
    Hook(
        target=f"{_MOONCAKE}.MooncakeKVManager.requires_dcp_relayout",
        kind="around",
        stage="transfer",
        impl=f"{_SRT}.disaggregation.mooncake.conn:requires_dcp_relayout",
        signature="self, dst_dcp_size, dst_dcp_rank",
        why="raises in the thread that decode servers register with, which ends, and every "
        "later request waits for its timeout",
        how="leaves the refusal to the check of the peer's layout",
        upstream="none",
        until="upstream rejects the peer",
    ),
    Hook(
        target=f"{_MOONCAKE}.MooncakeKVManager.prepare_dcp_token_item_lens",
        kind="around",
        stage="transfer",
        impl=f"{_SRT}.disaggregation.mooncake.conn:prepare_dcp_token_item_lens",
        signature="self, dst_page_item_lens, dst_dcp_size",
        why="raises there too, unless both ranks have the same heads",
        how="asks for that of latents alone",
        upstream="none",
        until="see try_ensure_parallel_info",
    ),
    Hook(
        target=f"{_MOONCAKE}.MooncakeKVManager._validate_peer_state_layout",
        kind="around",
        stage="transfer",
        impl=f"{_SRT}.disaggregation.mooncake.conn:validate_peer_state_layout",
        signature="self, registration_info",
        why="see requires_dcp_relayout",
        how="rejects a peer with another layout, with both values; its requests end at once",
        upstream="none",
        until="see requires_dcp_relayout",
    ),
    Hook(
        target=f"{_MOONCAKE}.MooncakeKVSender.failure_exception",
        kind="before",
        stage="transfer",
        impl=f"{_SRT}.disaggregation.mooncake.conn:name_rejection",
        signature="self",
        why="a rank that is told of a rejected peer by another rank gives no reason to its client",
        how="gives the reason for which it rejects that peer too",
        upstream="none",
        until="see requires_dcp_relayout",
    ),
    Hook(
        target=f"{_MOONCAKE}.MooncakeKVReceiver.failure_exception",
        kind="before",
        stage="transfer",
        impl=f"{_SRT}.disaggregation.mooncake.conn:name_mismatch",
        signature="self",
        why="a decode server that is rejected tells its clients of a prefill server that failed",
        how="gives the layouts of both, where they do not fit",
        upstream="none",
        until="see requires_dcp_relayout",
    ),
    Hook(
        target=f"{_MOONCAKE}.MooncakeKVManager.send_kvcache_dcp",
        kind="around",
        stage="transfer",
        impl=f"{_SRT}.disaggregation.mooncake.conn:send_kvcache_dcp",
        signature="self, mooncake_session_id, prefill_kv_indices, dst_kv_ptrs, "
        "dst_kv_indices, dcp_token_item_lens, dst_dcp_size, dst_dcp_rank, src_page_offset, "
        "decode_prefix_len, num_kv_tokens, executor, dst_layer_ids, pack_buffer=, "
        "dst_kv_item_lens=, dst_tp_rank=, dst_attn_tp_size=",
        why="knows whole rows only, which latents are",
        how="sends the heads that both ranks hold of the tokens that the decode rank owns",
        upstream="none",
        until="see try_ensure_parallel_info",
    ),
)
