"""Rows that move between slots of different owners."""

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang_helix.srt.layers.dcp.ownership import KVShard
from sglang_helix.srt.mem_cache import memory_pool
from srt import threads

pytestmark = pytest.mark.quick

ROWS, PAGE = 24, 4


def pool_of(shard: KVShard, whole: list[torch.Tensor], mla: bool) -> Any:
    """A rank's rows of buffers that are indexed by slot."""
    own = [buffer[shard.rank :: shard.size].clone() for buffer in whole]
    buffers = {"kv_buffer": own} if mla else {"k_buffer": own[:2], "v_buffer": own[2:]}
    return SimpleNamespace(**buffers, page_size=PAGE)


def move(
    rank: int, group: threads.ThreadGroup, whole: list[torch.Tensor], to: Any, of: Any, mla: bool
) -> Any:
    pool = pool_of(KVShard(group.world_size, rank), whole, mla)
    memory_pool.move_kv_cache(pytest.fail, pool, to, of)
    return pool.kv_buffer if mla else [*pool.k_buffer, *pool.v_buffer]


def test_a_whole_pool_moves_its_own_rows() -> None:
    moved: list[Any] = []
    pool = SimpleNamespace(dcp_replicated=True)
    memory_pool.move_kv_cache(lambda *args: moved.append(args), pool, 5, 7)
    assert moved == [(pool, 5, 7)]


@pytest.mark.parametrize("mla", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_rows_move_to_their_new_owners(
    monkeypatch: pytest.MonkeyPatch, size: int, dtype: torch.dtype, mla: bool
) -> None:
    """Against one pool of all slots; rows trade places, and padding moves slot 0 onto itself."""
    monkeypatch.setattr(memory_pool, "get_parallel", threads.get_parallel)
    generator = random.Random(size)
    whole = [torch.randint(0, 200, (ROWS * size, 2, width)).to(dtype) for width in (8, 8, 4, 4)]
    used = range(PAGE * size, ROWS * size)
    to = generator.sample(used, 11)
    of = [*to[1:4], to[0], *generator.sample(used, 7)]
    to, of = [*to, 0, 0], [*of, 0, 0]
    found = threads.run_threads(move, size, whole, torch.tensor(to), torch.tensor(of), mla)
    for number, buffer in enumerate(whole):
        expected = buffer.clone()
        expected[to] = buffer[of]
        for rank, buffers in enumerate(found):
            # The scratch page is anybody's to write.
            assert torch.equal(buffers[number][PAGE:], expected[rank::size][PAGE:])
