"""Host copies of a sharded K/V pool: every rank keeps its own rows. Extends `pool_host/mha.py`.

The prefix tree and the host pool's allocator count in widened slots, on the host as on the device,
and hand out whole widened pages. Page p of either is page p of every rank's rows, so a rank backs
up and loads the rows it owns, with no communication. Upstream does so for MLA only.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost
from torch import Tensor

from sglang_helix.srt.layers.dcp.ownership import KVShard


class ShardedMHATokenToKVPoolHost(MHATokenToKVPoolHost):
    """Rows of one rank, [size, heads of the group, head_dim] a layer, behind widened slots.

    Slots of a transfer are int64 [S]: whole widened pages, host and device in the same order.
    """

    def __init__(
        self,
        buffer_info: Any,
        ratio: float,
        host_size: float,
        page_size: int,
        layout: str,
        *,
        shard: KVShard,
        **kwargs: Any,
    ) -> None:
        """As upstream; page_size is the widened one, ratio and host_size (GB) are of this rank."""
        super().__init__(buffer_info, ratio, host_size, page_size // shard.size, layout, **kwargs)
        self.shard = shard
        # The base class counts slots and pages by these, but upstream's K/V pool hands it none.
        self.dcp_size, self.dcp_rank = shard.size, shard.rank
        self.clear()

    def load_to_device_per_layer(
        self,
        device_pool: Any,
        host_indices: Tensor,
        device_indices: Tensor,
        layer_id: int,
        io_backend: str,
        *,
        is_draft: bool = False,
    ) -> None:
        """One layer of this rank's rows, from the host."""
        super().load_to_device_per_layer(
            device_pool,
            self.shard.read_rows(host_indices),
            self.shard.read_rows(device_indices),
            layer_id,
            io_backend,
            is_draft=is_draft,
        )

    def backup_from_device_all_layer(
        self, device_pool: Any, host_indices: Tensor, device_indices: Tensor, io_backend: str
    ) -> None:
        """Every layer of this rank's rows, to the host."""
        super().backup_from_device_all_layer(
            device_pool,
            self.shard.read_rows(host_indices),
            self.shard.read_rows(device_indices),
            io_backend,
        )

    def get_data_page(self, index: int, flat: bool = True) -> Tensor:
        """This rank's rows of the widened page that begins at slot `index`, for storage."""
        return super().get_data_page(self._storage_row(index), flat)

    def set_from_flat_data_page(self, index: int, data_page: Tensor) -> None:
        """Put back what `get_data_page` gave."""
        super().set_from_flat_data_page(self._storage_row(index), data_page)

    def _storage_row(self, index: int) -> int:
        index = int(index)
        if index % self.logical_page_size or not 0 <= index < self.logical_size:
            raise ValueError(f"slot {index} begins no page of {self.logical_page_size} slots")
        return index // self.shard.size

    def get_page_buffer_meta(self, indices: Tensor) -> Any:
        """Addresses of pages, for storage that reads and writes in place: none does by owner."""
        raise NotImplementedError("K and V by owner are stored in files alone")
