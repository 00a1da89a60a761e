"""Rows of the pool that a rank owns, as a batch reads and writes them: seam 2 for every adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from torch import Tensor

from sglang_helix.srt.layers.attention.local_pages import LocalPages, local_rows
from sglang_helix.srt.layers.attention.windows import Tails
from sglang_helix.srt.layers.dcp.ownership import KVShard, scratch_rows

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch


class OwnedRows(AttentionBackend):
    """Of an attention backend, what it knows of the rows that its rank owns."""

    device: str
    mla: bool
    shard: KVShard
    pool_page_size: int
    token_to_kv_pool: Any
    req_to_token_pool: Any
    # Where a batch writes K and V: MLA's store finds the owners by itself.
    write_rows: Tensor | None = None
    # In captured graphs, what stands in them for tokens of other ranks.
    scratch_rows: Tensor | None = None
    # Keys that window layers see which share the pool of all layers; 0: the model has none.
    window = 0
    tails: Tails | None = None  # of the chunks at hand

    def prepare_writes(self, forward_batch: ForwardBatch) -> None:
        """Rows to write in an eager forward pass, and what its windows reach back to."""
        if not self.mla and forward_batch.out_cache_loc is not None:
            self.write_rows = self.shard.write_rows(
                forward_batch.out_cache_loc, self.pool_page_size
            )
        self.tails = None
        mode = forward_batch.forward_mode
        if self.window and mode.is_extend() and not mode.is_target_verify():
            self.tails = Tails.of(
                self.window,
                forward_batch.extend_prefix_lens_cpu,
                forward_batch.extend_seq_lens_cpu,
                forward_batch.req_pool_indices,
                self.req_to_token_pool.req_to_token,
                self.shard,
            )

    @property
    def local_window(self) -> int:
        """How many of the last `window` tokens of a request this rank holds, at most."""
        return self.window // self.shard.size

    def allocate_captured_writes(self, max_num_tokens: int) -> None:
        """What `prepare_captured_writes` reads."""
        if not self.mla:
            self.scratch_rows = scratch_rows(max_num_tokens, self.pool_page_size, self.device)

    def prepare_captured_writes(self, forward_batch: ForwardBatch) -> None:
        """Rows to write, in a graph: it reads slots where SGLang puts those of every replay.

        Padded rows have slot 0 there, and with it a row of page 0, which SGLang never allocates.
        """
        if self.scratch_rows is None:
            return  # MLA, or an eager pass of a backend that prepares both alike
        slots = forward_batch.out_cache_loc
        self.write_rows = self.shard.rows_or(slots, self.scratch_rows[: slots.shape[0]])

    def allocate_pages(self, requests: int, tokens: int) -> LocalPages:
        """For so many requests of at most so many tokens over all ranks."""
        return LocalPages.allocate(requests, tokens, self.shard, self.pool_page_size, self.device)

    def fill_pages(self, pages: LocalPages, requests: Tensor, lens: Tensor) -> None:
        """What this rank holds of the first lens [B] tokens of the requests [B], in place."""
        pages.fill(
            self.req_to_token_pool.req_to_token, requests, lens, self.shard, self.pool_page_size
        )

    def held_rows(
        self,
        requests: Tensor,
        lens: Tensor,
        on_host: Tensor,
        indptr: Tensor,
        out: Tensor | None = None,
    ) -> tuple[list[int], Tensor]:
        """How many of the first lens [B] tokens of requests [B] this rank holds, and their rows.

        on_host: the same lengths. indptr, out, and the rows: see `local_rows`.
        """
        held = self.shard.lens(on_host).tolist()
        table = self.req_to_token_pool.req_to_token
        return held, local_rows(table, requests, lens, self.shard, sum(held), indptr, out)

    def _store(
        self, layer: RadixAttention, forward_batch: ForwardBatch, k: Tensor, v: Tensor
    ) -> None:
        assert self.write_rows is not None
        loc = KVWriteLoc(
            self.write_rows[: k.shape[0]], physical=forward_batch.out_cache_loc_is_physical
        )
        self.token_to_kv_pool.set_kv_buffer(layer, loc, k, v, layer.k_scale, layer.v_scale)

    def _store_mla(
        self,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        latent: Tensor,
        rope: Tensor,
    ) -> None:
        # The pool's MLA store takes widened slots and resolves their owner itself.
        loc = KVWriteLoc.for_batch(forward_batch)
        self.token_to_kv_pool.set_mla_kv_buffer(
            layer, loc, latent, rope.view(*latent.shape[:-1], -1)
        )
