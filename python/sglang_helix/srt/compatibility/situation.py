"""What the rows of the compatibility table look at: a server's arguments and its model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sglang_helix import helix
from sglang_helix.srt.configs.model_config import cut_window_of, sharded_heads
from sglang_helix.srt.distributed.topology import legal_layouts
from sglang_helix.srt.layers.attention.adapters import Attention


@dataclass(frozen=True)
class Situation:
    """Resolved arguments, the model's configuration, and the series' own flags."""

    args: Any
    model: Any
    attn_tp_size: int | None = None
    replicates_v_proj: bool = False

    @property
    def sharded_by(self) -> tuple[str, int]:
        """The flag by which the user has the cache sharded, and its value."""
        if self.attn_tp_size is not None:
            return "--attn-tp-size", self.attn_tp_size
        return "--dcp-size", self.args.dcp_size

    @property
    def attention(self) -> Attention:
        """What the model's attention is, as the table of adapters has it."""
        return "MLA" if self.mla else "GQA"

    @property
    def mla(self) -> bool:
        """Whether the model's attention is multi-head latent attention."""
        from sglang.srt.configs.model_config import AttentionArch

        return bool(self.model.attention_arch == AttentionArch.MLA)

    @property
    def dsa(self) -> bool:
        """Whether the model is one of DeepSeek's sparse attention (V3.2, GLM-5)."""
        from sglang.srt.configs.model_config import is_deepseek_dsa

        return bool(is_deepseek_dsa(self.model.hf_config))

    @property
    def windows(self) -> bool:
        """Whether the model has layers of a sliding window, in a pool of their own."""
        return bool(self.model.is_hybrid_swa)

    @property
    def cut_windows(self) -> int:
        """Keys of the sliding windows that are cut by owner, in the pool of all layers; 0: none."""
        return cut_window_of(self.model)

    @property
    def hybrid(self) -> Any | None:
        """The configuration of a model some of whose layers keep recurrent states; else None."""
        from sglang.srt.configs.hybrid_arch import mambaish_config

        return mambaish_config(self.model)

    @property
    def attention_ranks(self) -> int:
        """Ranks of an attention replica, which divide its heads: SGLang's attention TP size."""
        args = self.args
        return int(args.tp_size // args.attn_dp_size // args.attn_cp_size)

    def fits(self, dcp_size: int) -> bool:
        """Whether the model's heads can be laid out on an attention replica's ranks."""
        kv_heads = 1 if self.mla else self.model.get_total_num_kv_heads()
        layouts = legal_layouts(self.attention_ranks, sharded_heads(self.model), kv_heads)
        return dcp_size in [layout.kvp_size for layout in layouts]

    @property
    def plain_heads_grouped(self) -> bool:
        """Whether plain TP already gives all ranks of a KVP group the same key-value heads."""
        return self._grouped_by_plain_tp(self.args.dcp_size)

    @property
    def sglang_groups_heads(self) -> bool:
        """Whether unmodified SGLang gives all ranks of a KVP group the same key-value heads."""
        return self.sglang_groups_heads_of(self.args.dcp_size)

    def sglang_groups_heads_of(self, dcp_size: int) -> bool:
        """`sglang_groups_heads`, of groups of so many ranks.

        Qwen3.5's class shards its heads by group; the others leave them to plain TP.
        """
        from sglang.srt.configs.model_config import is_qwen3_5

        return is_qwen3_5(self.model.hf_config) or self._grouped_by_plain_tp(dcp_size)

    def _grouped_by_plain_tp(self, dcp_size: int) -> bool:
        # MLA has one latent; each of fewer key-value heads than shards is copied to all of them.
        shards = self.attention_ranks // dcp_size
        return self.mla or bool(shards and shards % self.model.get_total_num_kv_heads() == 0)


def situation_of(server_args: Any) -> Situation:
    """The situation of a ServerArgs, as far as it is resolved."""
    from sglang.srt.arg_groups.overrides import model_config_of, resolved_view

    return Situation(
        resolved_view(server_args),
        model_config_of(server_args),
        attn_tp_size_of(server_args),
        replicates_v_proj(server_args),
    )


def attn_tp_size_of(server_args: Any) -> int | None:
    """A as the user gave it; None where they did not."""
    return getattr(server_args, helix.ATTN_TP_SIZE, None)


def replicates_v_proj(server_args: Any) -> bool:
    """Whether the user asked for `--dcp-replicate-v-proj`."""
    return bool(getattr(server_args, helix.REPLICATE_V_PROJ, False))
