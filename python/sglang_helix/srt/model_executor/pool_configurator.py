"""How memory is shared among the pools. Extends `model_executor/pool_configurator.py`.

A draft's cache beside the target's. And full layers beside windows: upstream's sizes of full layers
are rows, here a rank's, each of K tokens of requests; `--swa-full-tokens-ratio` speaks of tokens,
and the pool of the windows is whole.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from sglang.srt.configs.model_config import AttentionArch
from sglang.srt.model_executor.pool_configurator import (
    HybridSWAPoolConfigurator,
    MemoryPoolConfig,
    SWARequestCapPoolConfigurator,
    compute_swa_request_cap,
)
from sglang.srt.runtime_context import get_parallel


def count_draft(result: None, configurator: Any, kvc: Any) -> None:
    """After `DefaultPoolConfigurator.__init__`: bytes of a row of this rank, the draft's included.

    Upstream counts a draft layer as one of the target's, of its local rows. But a draft's cache is
    whole on every rank, K tokens to a row of the target's, with heads and widths of its own.
    """
    kvp_size = get_parallel().attn_dcp_size
    drafting = kvc.spec_algorithm.is_eagle() or kvc.spec_algorithm.is_standalone()
    if kvc.is_draft_worker or not drafting or kvp_size == 1:
        return
    target = configurator._compute_cell_size(kvc, kvc.layer_info.num_effective_layers)
    configurator._cell_size = target + kvp_size * draft_bytes(configurator, kvc)


def draft_bytes(configurator: Any, kvc: Any) -> int:
    """Bytes that a draft keeps of one token on every rank."""
    config = kvc.spec_aux_config.draft_model_config
    draft = SimpleNamespace(
        model_config=config,
        use_mla_backend=config.attention_arch == AttentionArch.MLA,
        is_draft_worker=True,
        kv_cache_dtype=kvc.kv_cache_dtype,
        kv_cache_dtype_str=kvc.kv_cache_dtype_str,
        server_args=kvc.server_args,
    )
    return int(configurator._compute_cell_size(draft, kvc.spec_aux_config.draft_kv_num_layers))


def create_memory_pool_configurator(original: Callable[[Any], Any], kvc: Any) -> Any:
    """Upstream's, or of its ones for windows that over a sharded cache."""
    configurator = original(kvc)
    ours = _SHARDED.get(type(configurator))
    return ours(kvc) if ours else configurator


class ShardedSWAPoolConfigurator(HybridSWAPoolConfigurator):
    """Window pools by their ratio to the tokens of full layers."""

    _full_per_token: int

    def __init__(self, kvc: Any) -> None:
        super().__init__(kvc)
        model, size = kvc.model_config, get_parallel().attn_dcp_size
        tp_size = get_parallel().attn_tp_size
        # Upstream counts the heads of plain TP; where A is below them a rank holds more.
        self._full_per_token = (
            self._full_per_token
            // model.get_num_kv_heads(tp_size)
            * model.get_num_kv_heads(tp_size, size)
        )
        self._swa_full_tokens_ratio *= size
        self._recompute_cell_size()

    def _make_pool_config(self, full_tokens: int, swa_tokens: int) -> MemoryPoolConfig:
        page = self._page_size * get_parallel().attn_dcp_size
        swa_tokens = swa_tokens // page * page
        self.validate_swa_pool_size(swa_tokens, self._sliding_window_size, page)
        return super()._make_pool_config(full_tokens, swa_tokens)


class ShardedSWARequestCapPoolConfigurator(
    ShardedSWAPoolConfigurator, SWARequestCapPoolConfigurator
):
    """Window pools by what `--max-running-requests` need, where no prefix is kept."""

    def __init__(self, kvc: Any) -> None:
        super().__init__(kvc)
        page = kvc.page_size * get_parallel().attn_dcp_size
        cap = compute_swa_request_cap(
            page_size=page, window=kvc.sliding_window_size, attn_dp_size=kvc.attn_dp_size
        )
        self._swa_cap = -(-cap // page) * page

    def calculate_pool_sizes_from_max_tokens(
        self, max_total_num_tokens: int, page_size: int
    ) -> MemoryPoolConfig:
        """As upstream's, which bounds the windows by the tokens of full layers: here K a row."""
        rows = max_total_num_tokens // page_size * page_size
        tokens = rows * get_parallel().attn_dcp_size
        return self._make_pool_config(rows, min(self._swa_cap, tokens))


_SHARDED: dict[type, type] = {
    HybridSWAPoolConfigurator: ShardedSWAPoolConfigurator,
    SWARequestCapPoolConfigurator: ShardedSWARequestCapPoolConfigurator,
}
