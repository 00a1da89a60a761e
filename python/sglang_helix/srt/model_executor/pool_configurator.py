"""Memory of a draft's cache beside the target's. Extends `model_executor/pool_configurator.py`."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from sglang.srt.configs.model_config import AttentionArch
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
