"""Rows of several ranks through their host pools and back, without a server."""

from typing import Any

import pytest
import torch
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang_cpu_reference import kv_transfer
from sglang_helix.srt.layers.dcp.ownership import KVShard
from sglang_helix.srt.mem_cache.pool_host.mha import ShardedMHATokenToKVPoolHost

pytestmark = pytest.mark.quick

PAGE, ROWS, LAYERS, HEADS, DIM = 4, 48, 2, 2, 8
LAYOUTS = ("layer_first", "page_first_direct")


@pytest.fixture(scope="module", autouse=True)
def transfers() -> None:
    kv_transfer.install()


class Rank:
    """One rank's device pool, and its host pool of half as many rows again."""

    def __init__(self, shard: KVShard, layout: str) -> None:
        self.shard = shard
        self.device = MHATokenToKVPool(
            size=ROWS,
            page_size=PAGE,
            dtype=torch.float32,
            head_num=HEADS,
            head_dim=DIM,
            layer_num=LAYERS,
            device="cpu",
            enable_memory_saver=False,
        )
        self.host = ShardedMHATokenToKVPoolHost(
            self.device.get_device_pool_infos()[0].buffer_info,
            1.5,
            0,
            PAGE * shard.size,
            layout,
            shard=shard,
            pin_memory=False,
            device_capacity_tokens=ROWS,
            start_layer=0,
            end_layer=LAYERS,
        )

    def buffers(self) -> list[torch.Tensor]:
        return [*self.device.k_buffer, *self.device.v_buffer]

    def write(self, slots: torch.Tensor, tokens: torch.Tensor) -> None:
        """Store each token's number, made different by layer and side, where this rank owns it."""
        mine = slots % self.shard.size == self.shard.rank
        for number, buffer in enumerate(self.buffers()):
            buffer[slots[mine] // self.shard.size] = (
                tokens[mine, None, None] * 10.0 + number
            ).expand(-1, HEADS, DIM)

    def read(self, slots: torch.Tensor) -> dict[int, list[float]]:
        """By slot that this rank owns, the number found in each buffer."""
        owned = [slot for slot in slots.tolist() if slot % self.shard.size == self.shard.rank]
        return {
            slot: [float(buffer[slot // self.shard.size].mean()) for buffer in self.buffers()]
            for slot in owned
        }


def slots_of(pages: list[int], width: int) -> torch.Tensor:
    return torch.cat([torch.arange(page * width, (page + 1) * width) for page in pages])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_every_token_comes_back_to_its_owner(size: int, layout: str) -> None:
    """Two sequences go to the host in one transfer and return, in one, to other pages."""
    ranks = [Rank(KVShard(size, rank), layout) for rank in range(size)]
    width = PAGE * size
    before, after = [3, 1, 7, 2, 5], [6, 4, 9, 8, 1]
    tokens = torch.arange(len(before) * width)
    found: dict[int, list[float]] = {}
    for rank in ranks:
        rank.write(slots_of(before, width), tokens)
        # As the allocator of every rank answers: other pages than the device's, same on all.
        rank.host.alloc(2 * width)
        kept = rank.host.alloc(len(tokens))
        assert kept is not None
        backend: Any = "direct"
        rank.host.backup_from_device_all_layer(rank.device, kept, slots_of(before, width), backend)
        for buffer in rank.buffers():
            buffer.fill_(torch.nan)
        for layer in range(LAYERS):
            rank.host.load_to_device_per_layer(
                rank.device, kept, slots_of(after, width), layer, backend
            )
        found |= rank.read(slots_of(after, width))
    for slot, token in zip(slots_of(after, width).tolist(), tokens.tolist(), strict=True):
        assert found[slot] == [token * 10.0 + number for number in range(2 * LAYERS)], token


@pytest.mark.parametrize("layout", ["layer_first", "page_first", "page_first_direct"])
def test_pages_in_storage_are_those_of_the_owner(layout: str) -> None:
    """A widened page's rows of one rank go out flat, and come back as another page."""
    host = Rank(KVShard(2, 1), layout).host
    host.kv_buffer.copy_(torch.arange(host.kv_buffer.numel()).view_as(host.kv_buffer))
    wide = 2 * PAGE
    page = host.get_data_page(3 * wide)
    assert page.numel() == host.get_dummy_flat_data_page().numel()
    untouched = host.get_data_page(wide).clone()
    host.set_from_flat_data_page(2 * wide, page)
    assert torch.equal(host.get_data_page(2 * wide), page)
    assert torch.equal(host.get_data_page(wide), untouched)
    for slot in (1, -wide, host.logical_size):
        with pytest.raises(ValueError, match=f"slot {slot} begins no page of {wide} slots"):
            host.get_data_page(slot)


@pytest.mark.parametrize("size", [2, 4])
def test_the_host_pool_counts_in_widened_slots(size: int) -> None:
    host = Rank(KVShard(size, 1), "layer_first").host
    rows = (ROWS * 3 // 2 // PAGE + 1) * PAGE
    assert (host.size, host.page_size) == (rows, PAGE)
    assert host.logical_page_size == PAGE * size
    assert host.available_size() == rows * size
    everything = host.alloc(rows * size)
    assert everything is not None
    assert host.alloc(PAGE * size) is None
    host.free(everything)
    assert host.available_size() == rows * size
    with pytest.raises(AssertionError, match="multiple of the page size"):
        host.alloc(PAGE)
