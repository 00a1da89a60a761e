"""A prompt is refused with the numbers or answered, for every length up to the pool's end."""

import itertools
from array import array
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock
from unittest.mock import MagicMock

import pytest
from sglang_cpu_reference.checkpoints import make_checkpoint
from srt.expected import check, prompt
from srt.fresh import Fresh
from srt.models.serving import command_line, serve
from srt.rank import published


class Case(NamedTuple):
    """A request alone in a pool of whole widened pages.

    ahead: tokens that a decode step allocates beyond a request's own, drafts among them.
    """

    page: int
    ranks: int
    pages: int
    length: int
    asked: int
    chunk: int | None
    prefix_cache: bool
    ahead: int = 2


def cases() -> list[Case]:
    sizes = [(1, 2, 4), (1, 2, 9), (1, 4, 5), (2, 3, 2), (16, 2, 3), (4, 8, 1)]
    found = []
    for page, ranks, pages in sizes:
        widened = page * ranks
        found += [
            Case(page, ranks, pages, *rest)
            for rest in itertools.product(
                range(1, pages * widened + 2),
                (1, 1 << 30),
                (None, widened, 2 * widened + 1),
                (True, False),
            )
        ]
        found += [
            Case(page, ranks, pages, length, asked, None, True, ahead=16)
            for length in range(1, pages * widened + 2)
            for asked in (1, 1 << 30)
        ]
    return found


def test_every_length_is_refused_or_fits(ready: Fresh, tmp_path: Path) -> None:
    """And an answer that was asked for has a token, and ends in the pool."""
    argv = command_line(make_checkpoint("llama", tmp_path / "llama"), 1)
    assert ready.value(_stuck, argv, cases()) == []


def _stuck(argv: list[str], given: list[Case]) -> list[tuple[Case, str]]:
    """Through SGLang's own bound of the answer, PrefillAdder and allocator: what went wrong."""
    published(0, argv)
    return [(case, wrong) for case in given if (wrong := _wrong(case))]


@cache
def _pool(held: int, widened: int) -> tuple[Any, Any]:
    """SGLang's allocator, and an empty prefix cache for it."""
    import torch
    from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator

    allocator: Any = PagedTokenToKVPoolAllocator(
        held, widened, torch.float32, "cpu", kvcache=MagicMock(), need_sort=False
    )
    tree = MagicMock(buffer_pipeline=None)
    tree.evictable_size.return_value = 0
    tree.supports_mamba.return_value = False
    return allocator, tree


def _wrong(case: Case) -> str:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.managers.schedule_policy import PrefillAdder
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.mem_cache import allocation_sizing
    from sglang.srt.sampling.sampling_params import SamplingParams

    widened = case.page * case.ranks
    held = case.pages * widened
    allocator, tree = _pool(held, widened)
    allocator.clear()
    tree.disable = not case.prefix_cache
    scheduler = SimpleNamespace(
        max_new_tokens_limit=None,
        max_req_len=held - 1,
        max_req_input_len=held - 6,
        max_total_num_tokens=held,
        kv_shard_widening=1,
        page_size=case.page,
        token_to_kv_pool_allocator=allocator,
        sliding_window_size=None,
        chunked_prefill_size=case.chunk,
    )
    sampling = SamplingParams(max_new_tokens=case.asked, ignore_eos=True)
    sampling.normalize(None)
    req = Req("0", "", array("q", range(case.length)), sampling)
    ahead = mock.patch.object(
        allocation_sizing, "get_alloc_reserve_per_decode", return_value=case.ahead
    )
    with ahead:
        Scheduler.init_req_max_new_tokens(scheduler, req)
    if case.length >= scheduler.max_req_input_len:
        return ""  # refused by SGLang's check of the length, which comes next
    new_tokens = min(case.asked, held - case.ahead - case.length)
    if new_tokens < 1:
        said = getattr(req.to_finish, "message", "")
        named = all(f" {n} " in said for n in (held, case.ahead)) and f"({case.length} " in said
        return "" if named else f"no token, and {req.to_finish}"
    if req.to_finish is not None or sampling.max_new_tokens != new_tokens:
        return f"{sampling.max_new_tokens} new tokens, {req.to_finish}"
    while req.prefix_len < case.length:
        adder = PrefillAdder(
            case.page, tree, allocator, None, 1.0, 1 << 20, case.chunk, waiting_queue_len=1
        )
        req.init_next_round_input()
        if req.prefix_len:
            adder.add_chunked_req(req)
        else:
            adder.add_one_req(req, has_chunked_req=False, truncation_align_size=None)
        if adder.can_run_list != [req]:
            return f"waits with {req.prefix_len} tokens prefilled"
        if not sampling.ignore_eos:
            return "the request was changed"
        pages = -(-req.extend_end // widened) - req.prefix_len // widened
        if allocator.alloc(pages * widened) is None:
            return f"no memory for tokens {req.prefix_len} to {req.extend_end}"
        req.prefix_len = req.extend_end
    return ""


PAGE, RANKS, ROWS = 16, 2, 100
WIDENED = PAGE * RANKS
HELD = ROWS // PAGE * WIDENED
#: SGLang refuses a prompt that leaves fewer than 7 tokens to the answer.
LONGEST = HELD - 7


@pytest.mark.parametrize(
    ("family", "flags"),
    [
        ("llama", ("--disable-radix-cache", "--allow-auto-truncate")),
        ("deepseek_v2", ("--chunked-prefill-size", "64")),
    ],
)
def test_prompts_up_to_the_end_of_the_pool_are_answered(
    ready: Fresh, tmp_path: Path, family: str, flags: tuple[str, ...]
) -> None:
    """And longer ones are shortened or refused."""
    model = make_checkpoint(family, tmp_path / family, num_hidden_layers=2)
    lengths = (HELD - 2 * WIDENED + 1, HELD - WIDENED, HELD - WIDENED + 1, LONGEST, LONGEST + 2)
    asked = 9
    sizes = ("--page-size", str(PAGE), "--max-total-tokens", str(ROWS), "--dcp-size", str(RANKS))
    batches = [[prompt(length)] for length in lengths]
    for report in serve(ready, model, RANKS, (*sizes, *flags), batches, asked):
        for [tokens], [answer] in zip(batches, report.answers, strict=True):
            if len(tokens) > LONGEST and "--allow-auto-truncate" in flags:
                check(model, tokens[: LONGEST + 1], answer, HELD - 2 - (LONGEST + 1))
            elif len(tokens) > LONGEST:
                assert answer.finish["status_code"] == 400
                assert str(len(tokens)) in answer.finish["message"]
                assert str(LONGEST + 1) in answer.finish["message"]
            else:
                check(model, tokens, answer, min(asked, HELD - 2 - len(tokens)))
