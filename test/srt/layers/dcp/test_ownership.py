"""Who owns which row, against a simulation that keeps every token in a dictionary."""

import pytest
import torch
from sglang_helix.srt.layers.dcp.ownership import KVShard
from srt.slots import Slots

pytestmark = pytest.mark.quick

RANKS = (1, 2, 3, 4, 6, 8)
PAGES = (1, 16, 64)
LENGTHS = (1, 2, 5, 63, 64, 65, 200)

each_layout = pytest.mark.parametrize(
    ("ranks", "page"), [(ranks, page) for ranks in RANKS for page in PAGES]
)


def allocated(ranks: int, page: int) -> Slots:
    slots = Slots(ranks, page, pages=len(LENGTHS) + sum(LENGTHS) // (ranks * page) + 1)
    for request, length in enumerate(LENGTHS):
        slots.extend(request, length)
    return slots


def shards(ranks: int) -> list[KVShard]:
    return [KVShard(ranks, rank) for rank in range(ranks)]


@pytest.mark.parametrize("ranks", RANKS)
def test_lens_count_every_kth_token(ranks: int) -> None:
    lens = torch.arange(4 * ranks + 3)
    for shard in shards(ranks):
        counted = [sum(t % ranks == shard.rank for t in range(length)) for length in lens.tolist()]
        assert shard.lens(lens).tolist() == counted
    assert torch.equal(torch.stack([shard.lens(lens) for shard in shards(ranks)]).sum(0), lens)


@each_layout
def test_every_token_has_one_row_of_one_rank(ranks: int, page: int) -> None:
    slots = allocated(ranks, page)
    held: dict[tuple[int, int], tuple[int, int]] = {}
    for request, its_slots in slots.of.items():
        tokens = torch.tensor(its_slots)
        for shard in shards(ranks):
            rows = shard.read_rows(tokens).tolist()
            assert len(rows) == int(shard.lens(torch.tensor(len(its_slots))))
            for row, position in zip(rows, range(shard.rank, len(its_slots), ranks), strict=True):
                assert page <= row < slots.rows
                assert (shard.rank, row) not in held, "two tokens in one row"
                held[shard.rank, row] = request, position
    everything = {(r, t) for r, length in enumerate(LENGTHS) for t in range(length)}
    assert len(held) == len(everything)
    assert set(held.values()) == everything


@each_layout
def test_a_write_lands_where_it_is_read_and_nowhere_else(ranks: int, page: int) -> None:
    slots = allocated(ranks, page)
    for shard in shards(ranks):
        pool = torch.full((slots.rows,), -1)
        written = []
        for request, its_slots in slots.of.items():
            tokens = torch.arange(len(its_slots)) + 1000 * request
            # In two chunks, the second of which starts anywhere in a page.
            for part in (slice(0, len(its_slots) // 3), slice(len(its_slots) // 3, None)):
                chunk = torch.tensor(its_slots[part], dtype=torch.int64)
                rows = shard.write_rows(chunk, page)
                assert len(rows) == len(chunk)
                assert bool((rows[(tokens[part] % 1000) % ranks != shard.rank] < page).all())
                pool[rows] = tokens[part]
                written += rows[rows >= page].tolist()
        assert len(written) == len(set(written)), "a row was written twice"
        for request, its_slots in slots.of.items():
            rows = shard.read_rows(torch.tensor(its_slots))
            assert pool[rows].tolist() == [
                t + 1000 * request for t in range(shard.rank, len(its_slots), ranks)
            ]
        assert int((pool[page:] >= 0).sum()) == len(written)


def test_no_tokens() -> None:
    nothing = torch.empty(0, dtype=torch.int64)
    for shard in shards(3):
        assert shard.read_rows(nothing).shape == (0,)
        assert shard.write_rows(nothing, 16).shape == (0,)


def test_padding_is_written_to_the_scratch_page() -> None:
    """SGLang pads a batch with slot 0."""
    for shard in shards(4):
        assert bool((shard.write_rows(torch.zeros(40, dtype=torch.int64), 16) < 16).all())
