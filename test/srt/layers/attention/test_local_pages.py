"""A rank's lengths and pages against `KVShard`, in plain torch and by the kernel."""

import itertools

import pytest
import torch
from sglang_helix.srt.layers.attention.flashinfer_plans import planned
from sglang_helix.srt.layers.attention.local_pages import LocalPages
from sglang_helix.srt.layers.dcp.ownership import KVShard
from srt.fresh import Fresh
from srt.slots import Slots

LENGTHS = (1, 5, 63, 64, 65, 130, 2, 300)


def wrong_rows() -> list[str]:
    """Cases in which following the pages leads to other rows than the rank's."""
    wrong = []
    for ranks, page in itertools.product((1, 2, 3, 8), (1, 4, 64)):
        slots = Slots(ranks, page, pages=800)
        for request, length in enumerate(LENGTHS):
            slots.extend(request, length)
        table = slots.table()
        # Request 0 pads: it reads page 0, of which the first rank holds a token.
        requests = torch.tensor([3, 0, 7, 5, 1, 2])
        lens = torch.tensor([LENGTHS[r] for r in requests])
        for rank in range(ranks):
            shard = KVShard(ranks, rank)
            pages = LocalPages.allocate(len(lens) + 2, max(LENGTHS), shard, page, "cpu")
            pages.table.fill_(-1)
            first = pages.first(len(lens))
            before = [part.data_ptr() for part in (pages.lens, pages.empty, pages.table)]
            # In place, and once more for shorter requests in other places.
            for order in (slice(None), torch.tensor([1, 0, 4, 2, 3, 5])):
                first.fill(table, requests[order], lens[order], shard, page)
                for row, (request, length) in enumerate(
                    zip(requests[order], lens[order], strict=True)
                ):
                    held = int(first.lens[row])
                    rows = (
                        first.table[row, : -(-held // page), None] * page + torch.arange(page)
                    ).flatten()[:held]
                    wanted = shard.read_rows(table[request, :length])
                    if not torch.equal(rows.long(), wanted.long()):
                        wrong.append(f"{ranks} ranks, page {page}, rank {rank}, length {length}")
                    if bool(first.empty[row]) != (held == 0):
                        wrong.append(f"{ranks} ranks, rank {rank}: {held} tokens, empty or not")
            assert before == [part.data_ptr() for part in (pages.lens, pages.empty, pages.table)]
            assert pages.table[len(lens) :].eq(-1).all()
            assert pages.table.shape[1] == -(-max(LENGTHS) // (ranks * page))
    return wrong


def test_pages_lead_to_the_rows_of_the_rank() -> None:
    assert wrong_rows() == []


def test_kernel(fresh: Fresh) -> None:
    pytest.importorskip("triton")
    assert fresh.value(wrong_rows, TRITON_INTERPRET="1") == []


def test_a_plan_waits_for_the_copy_of_the_last_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of its own wrapper, whose pinned memory it would overwrite."""
    done: list[str] = []
    names = iter(("first", "other"))

    class Event:
        def __init__(self) -> None:
            self.name = next(names)

        def record(self) -> None:
            done.append(f"record {self.name}")

        def synchronize(self) -> None:
            done.append(f"wait for {self.name}")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    first, other = (type("Wrapper", (), {})() for _ in range(2))
    for wrapper in (first, other, first):
        with planned(wrapper, "cuda"):
            done.append("plan")
    assert done == [
        *("plan", "record first"),
        *("plan", "record other"),
        *("wait for first", "plan", "record first"),
    ]
