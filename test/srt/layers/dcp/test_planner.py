"""The plan of MLA's extend over a sharded prefix, against tokens counted one by one."""

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.layers.dcp import comm
from sglang.srt.layers.dcp.metadata import DecodeContextParallelMetadata
from sglang_helix.srt.layers.dcp import planner
from srt.slots import Slots
from srt.threads import ThreadGroup, get_parallel, run_threads
from torch.utils._python_dispatch import TorchDispatchMode

pytestmark = pytest.mark.quick

WIDTH = 6  # of a latent row; the last two are the rotary part

# (prefix length, chunk length) of each request of a batch.
BATCHES = {
    "one request": [(7, 5)],
    "no prefix": [(0, 3)],
    "no prefix at all": [(0, 3), (0, 1), (0, 130)],
    "shorter than K": [(1, 2), (2, 1), (3, 4)],
    "some empty": [(0, 4), (9, 1), (0, 2), (65, 3)],
    "multiples of K": [(48, 5), (96, 1)],
    "not multiples of K": [(49, 5), (95, 1), (1, 1), (127, 70)],
}


@pytest.fixture(autouse=True)
def _ranks_are_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    # By slot: no unified pool translates them, so its part is the owner's row number.
    translator = SimpleNamespace(
        translate_dcp_read_ids=lambda slots: slots // get_parallel().attn_dcp_size
    )
    backend = SimpleNamespace(kv_index_translator=translator)
    monkeypatch.setattr(planner, "get_parallel", get_parallel)
    monkeypatch.setattr(planner, "get_attn_backend", lambda: backend)
    monkeypatch.setattr(comm, "get_parallel", get_parallel)


class Memory(TorchDispatchMode):
    """Counts the bytes of every tensor that operations make in a ``with`` statement."""

    made = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        if isinstance(result, torch.Tensor):
            storage = result.untyped_storage()
            self.made += storage.nbytes() if storage.data_ptr() not in given else 0
        return result


def token(request: int, position: int) -> list[float]:
    return [1000.0 * request + position] * WIDTH


def plan(
    batch: list[tuple[int, int]], slots: Slots, width: int = WIDTH
) -> DecodeContextParallelMetadata:
    prefixes, chunks = (list(lens) for lens in zip(*batch, strict=True))
    lens = [prefix + chunk for prefix, chunk in batch]
    # Requests of a batch stand anywhere in the table.
    places = random.Random(len(batch)).sample(range(len(batch)), len(batch))
    table = slots.table()
    scattered = torch.zeros_like(table)
    scattered[places] = table
    made = planner.prepare_decode_context_parallel_metadata(
        seq_lens=torch.tensor(lens),
        extend_prefix_lens=torch.tensor(prefixes),
        extend_prefix_lens_cpu=prefixes,
        extend_seq_lens=torch.tensor(chunks),
        req_pool_indices=torch.tensor(places),
        req_to_token=scattered,
        seq_lens_sum=sum(lens),
        kv_buffer_shape=torch.Size([slots.rows, 1, width]),
        kv_cache_dtype=torch.float32,
        kv_cache_device="cpu",
        create_chunked_prefix_cache_kv_indices_fn=lambda *_: None,
    )
    assert made is not None
    return made


def on_rank(rank: int, group: ThreadGroup, batch: list[tuple[int, int]], page: int) -> torch.Tensor:
    """The batch's tokens by request and position, read as attention reads the gathered buffer."""
    ranks = group.world_size
    slots = Slots(ranks, page, pages=600)
    pool = torch.full((slots.rows, 1, WIDTH), float("nan"))
    for request, (prefix, chunk) in enumerate(batch):
        for position, slot in enumerate(slots.extend(request, prefix + chunk)):
            if slot % ranks == rank and position < prefix:
                pool[slot // ranks, 0] = torch.tensor(token(request, position))
    made = plan(batch, slots)
    latent = torch.tensor(
        [token(r, prefix + c) for r, (prefix, chunk) in enumerate(batch) for c in range(chunk)]
    ).unsqueeze(1)

    def rows_of(layer: object, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return pool[rows][..., :-2], pool[rows][..., -2:]

    comm.all_gather_kv_cache_for_mla_extend(
        SimpleNamespace(get_mla_kv_buffer=rows_of),
        None,
        [prefix for prefix, _ in batch],
        made.dcp_local_prefix_kv_indices,
        made.dcp_extend_prefix_lens_sum,
        made.dcp_kv_buffer,
        WIDTH - 2,
        latent[..., :-2],
        latent[..., -2:],
    )
    assert made.dcp_kv_indptr.tolist() == [
        sum(prefix + chunk for prefix, chunk in batch[:count]) for count in range(len(batch) + 1)
    ]
    prefixes = made.dcp_kv_buffer[: made.dcp_extend_prefix_lens_sum]
    assert prefixes[:, 0, 0].tolist() == [
        token(r, position)[0] for r, (prefix, _) in enumerate(batch) for position in range(prefix)
    ]
    return made.dcp_kv_buffer[made.dcp_kv_indices.long(), 0]


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("page", [1, 16])
@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_gathered_buffer_holds_every_token_in_order(ranks: int, page: int, name: str) -> None:
    batch = BATCHES[name]
    expected = torch.tensor(
        [token(r, t) for r, (prefix, chunk) in enumerate(batch) for t in range(prefix + chunk)]
    )
    for read in run_threads(on_rank, ranks, batch, page):
        assert torch.equal(read, expected)


def test_the_buffer_takes_no_memory_before_it_is_used() -> None:
    def alone(rank: int, group: ThreadGroup) -> None:
        slots = Slots(group.world_size, 1, pages=600)
        slots.extend(0, 12)
        made = plan([(7, 5)], slots, width=1 << 50)
        with pytest.raises(RuntimeError, match="allocate"):
            made.dcp_kv_buffer  # noqa: B018 asking for it is what allocates

    run_threads(alone, 2)


def test_the_plan_takes_no_more_memory_than_it_must() -> None:
    """Eight bytes for each of this rank's tokens; for each of the batch's only when asked."""

    def alone(rank: int, group: ThreadGroup) -> None:
        batch = [(6000, 10), (0, 7), (2000, 5)]
        slots = Slots(group.world_size, 16, pages=600)
        for request, lens in enumerate(batch):
            slots.extend(request, sum(lens))
        local, tokens, small = 8000 // group.world_size, 8022, 4096
        with Memory() as planning:
            made = plan(batch, slots)
        # The helper's tables, then steps and sums, slots, rows.
        tables = 2 * 4 * slots.table().numel()
        assert planning.made < tables + (2 * 8 + 2 * 4) * local + small
        with Memory() as asking:
            assert made.dcp_kv_indices.dtype == torch.int32
        assert 4 * tokens <= asking.made < 2 * 4 * tokens + small  # not before it is asked for

    run_threads(alone, 4)


def test_nothing_to_plan_without_a_sharded_cache() -> None:
    def alone(rank: int, group: ThreadGroup) -> object:
        nothing = torch.empty(0, dtype=torch.int64)
        return planner.prepare_decode_context_parallel_metadata(
            nothing, nothing, [], nothing, nothing, nothing, 0, torch.Size(), torch.float32, "cpu",
            lambda: None,
        )  # fmt: skip

    assert run_threads(alone, 1) == [None]
