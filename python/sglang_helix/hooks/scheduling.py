"""Hooks: which requests are taken, and for how many tokens."""

from __future__ import annotations

from sglang_helix.hook import Hook

_SRT = "sglang_helix.srt"

SCHEDULING: tuple[Hook, ...] = (
    Hook(
        target="sglang.srt.beam_search.coordinator.BeamCoordinator.validate_and_init",
        kind="replace",
        stage="serve",
        impl=f"{_SRT}.beam_search.coordinator:validate_and_init",
        signature="self, req, recv_req",
        why="lets beams through at pages of one token, though a sharded pool's are K times as "
        "long: all beams would write to the same slots",
        how="refuses the request",
        upstream="none",
        until="upstream asks for the allocator's page size",
    ),
    Hook(
        target="sglang.srt.managers.schedule_policy.PrefillAdder.__init__",
        kind="before",
        stage="serve",
        impl=f"{_SRT}.managers.schedule_policy:prefill_adder_init",
        signature="self, page_size, tree_cache, token_to_kv_pool_allocator, running_batch, "
        "new_token_ratio, rem_input_tokens, rem_chunk_tokens, num_mixed_decode_tokens=, "
        "priority_scheduling_preemption_threshold=, max_prefill_bs=, max_running_requests=, "
        "prefill_max_requests=, prefill_delayer_single_pass=, dllm_config=, "
        "waiting_queue_len=, prefill_tile_block_m=",
        why="budgets in the pool's pages, not the allocator's K times longer ones",
        how="hands it the allocator's page size",
        upstream="none",
        until="the scheduler passes the allocator's page size",
    ),
    Hook(
        target="sglang.srt.managers.schedule_policy.PrefillAdder.add_one_req",
        kind="around",
        stage="serve",
        impl=f"{_SRT}.managers.schedule_policy:add_one_req",
        signature="self, req, has_chunked_req, truncation_align_size",
        why="a prompt that reaches into the pool's last two pages is accepted and waits for "
        "ever, and everything behind it; K times as many lengths as in plain TP",
        how="asks for no page in reserve where nothing else runs",
        upstream="none",
        until="upstream admits what fits an idle pool",
    ),
    Hook(
        target="sglang.srt.managers.scheduler.Scheduler.init_req_max_new_tokens",
        kind="around",
        stage="serve",
        impl=f"{_SRT}.managers.scheduler:init_req_max_new_tokens",
        signature="self, req",
        why="a prompt with no room for an answer gets one of no token, with finish reason "
        "length; so does one that --allow-auto-truncate is about to shorten",
        how="shortens first, and refuses with the numbers",
        upstream="none",
        until="upstream refuses such a prompt",
    ),
    *(
        Hook(
            target=f"sglang.srt.mem_cache.allocator.{allocator}.max_new_tokens_for_memory",
            kind="replace",
            stage="serve",
            impl=f"{_SRT}.mem_cache.allocator.base:max_new_tokens_for_memory",
            signature="self, input_tokens, max_new_tokens, token_capacity, "
            "sliding_window_size, chunk_size",
            why="keeps back a page and the rest of another, so that answers are empty while "
            "a page is free; K times as many lengths as in plain TP",
            how="gives the answer all slots but those that a decode step takes ahead",
            upstream="none",
            until="upstream counts slots and not pages",
        )
        for allocator in ("paged.PagedTokenToKVPoolAllocator", "swa.SWATokenToKVPoolAllocator")
    ),
)
