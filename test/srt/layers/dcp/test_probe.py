"""The probe of a start: an exchange that is wrong on one rank stops every rank by name."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from sglang.srt.distributed import parallel_state
from sglang_cpu_reference.checkpoints import make_checkpoint
from sglang_helix.srt.layers.dcp.exchange import BACKENDS, Exchanger, a2a, ag_rs
from sglang_helix.srt.layers.dcp.partial import Masked, Partial
from sglang_helix.srt.layers.dcp.probe import probe
from srt.distributed.ranks import collective_backend, run_ranks
from srt.fresh import Fresh
from srt.layers.dcp.test_exchange import install
from srt.models.serving import command_line, scheduler_of

HEADS, DIMS = 12, (32, 80)


def of_another_rank(out: Any, lse: Any, group: Any, **options: Any) -> Any:
    out, lse = a2a(out, lse, group, **options)
    return Partial(out.roll(1, 1), lse)


def with_the_other_base(
    out: Any, lse: Any, group: Any, *, base2: bool = False, **options: Any
) -> Any:
    return a2a(out, lse, group, base2=not base2, **options)


def without_its_lse(out: Any, lse: Any, group: Any, **options: Any) -> Any:
    out, lse = ag_rs(out, lse, group, **options)
    return Partial(out, lse + 0.5)


def of_empty_shards(out: Any, lse: Any, group: Any, **options: Any) -> Any:
    whole, total = a2a(out, lse, group, **options)
    return Partial(whole.masked_fill((total == -torch.inf)[..., None], torch.nan), total)


def that_raises(out: Any, lse: Any, group: Any, **options: Any) -> Any:
    a2a(out, lse, group, **options)
    raise ValueError("no such kernel")


def in_another_order(exchanger: Any, parts: Any, layer: int) -> Any:
    whole = torch.cat([part.transpose(0, 1) for part in parts], -1)
    gathered = exchanger.group.all_gather(whole.contiguous(), dim=0)
    return gathered.roll(1, 0).transpose(0, 1)


def gathers_and_raises(exchanger: Any, parts: Any, layer: int) -> Any:
    in_another_order(exchanger, parts, layer)
    raise ValueError("no such kernel")


WRONG_QUERIES = {
    "48 of 48 are not what their rank sent": in_another_order,
    "it raised ValueError: no such kernel": gathers_and_raises,
}
QUERIES = ((32, 8), (80,))

BROKEN = {
    "the output is off": (of_another_rank, with_the_other_base, of_empty_shards),
    "the LSE is off": (without_its_lse,),
    "it raised ValueError: no such kernel": (that_raises,),
}


def probed(rank: int, world_size: int) -> list[str]:
    """What is not as it should be on a rank."""
    install()
    group, wrong = parallel_state.get_world_group(), []
    backends = ["a2a", "ag_rs"]
    if torch.cuda.is_available():
        backends.append("symm")

    def prepared(name: str) -> Exchanger:
        exchanger = group.exchanger = Exchanger(name, group)
        for width in DIMS:
            exchanger.prepare(
                max_tokens=3,
                num_heads=HEADS,
                head_dim=width,
                dtype=torch.bfloat16,
                timeout=60.0,
            )
        for parts in QUERIES:
            exchanger.prepare_queries(
                max_tokens=3,
                num_heads=HEADS,
                widths=parts,
                dtype=torch.bfloat16,
                timeout=60.0,
            )
        return exchanger

    def run(exchanger: Exchanger, **options: Any) -> str:
        shape: Any = {"num_heads": HEADS, "head_dims": DIMS, "dtype": torch.bfloat16}
        options = {"base2": False, "form": "splits", "queries": QUERIES, "max_tokens": 3} | options
        options = shape | options
        try:
            probe(exchanger, group.cpu_group, **options)
        except RuntimeError as error:
            return str(error)
        return ""

    for name in backends:
        exchanger = prepared(name)
        for options in (
            {},
            {"base2": True},
            {"base2": True, "form": "masked rows"},
            {"dtype": torch.float32, "max_tokens": None},
        ):
            wrong += [f"{name} {options}: {said}" for said in [run(exchanger, **options)] if said]
    right = BACKENDS["ag_rs"]
    for what, exchanges in BROKEN.items():
        for broken in exchanges:
            # A rank that goes its own way still takes part in the collectives of the others.
            others = right.collective if broken is without_its_lse else a2a
            bad = broken if rank == 1 else others
            BACKENDS["ag_rs"] = replace(right, collective=bad)
            said = run(prepared("ag_rs"), form="rows")
            BACKENDS["ag_rs"] = right
            expected = "--dcp-comm-backend ag_rs does not give what attention over all ranks gives"
            told = f"(rank 1: rows of 32 elements in torch.bfloat16: {what}"
            if not said.startswith(expected) or told not in said or "rank 0:" in said:
                wrong.append(f"{broken.__name__}: {said!r}")
    marked = Masked.marked
    if rank == 1:
        Masked.marked = lambda masked: Partial(masked.out, masked.unmarked)  # type: ignore[assignment,method-assign]
    said = run(prepared("a2a"), form="masked rows")
    Masked.marked = marked  # type: ignore[method-assign]
    for hit in range(2):  # what rank 1 sends reaches all heads
        if f"rank {hit}: masked rows of 32 elements in torch.bfloat16: the output is" not in said:
            wrong.append(f"masked: {said!r}")
    for what, gathered in WRONG_QUERIES.items():
        exchanger = prepared("a2a")
        if rank == 1:
            exchanger.gathered = partial(gathered, exchanger)  # type: ignore[method-assign]
        said = run(exchanger, form="rows", max_tokens=None)
        told = f"(rank 1: gathered queries of (32, 8) elements in torch.bfloat16: {what}"
        if told not in said or "rank 0:" in said:
            wrong.append(f"{gathered.__name__}: {said!r}")
    return wrong


@pytest.mark.multi_gpu
@pytest.mark.parametrize("world_size", [2, 3])
def test_what_is_wrong_on_one_rank_stops_all_by_name(world_size: int) -> None:
    backend = collective_backend(world_size)
    for rank, wrong in enumerate(run_ranks(probed, world_size, backend=backend)):
        assert not wrong, f"rank {rank}: {wrong}"


def started_broken(rank: int, argv: list[str]) -> None:
    if rank == 1:
        BACKENDS["a2a"] = replace(BACKENDS["a2a"], collective=with_the_other_base)
    scheduler_of(rank, argv)


def started(rank: int, argv: list[str]) -> str:
    scheduler = scheduler_of(rank, argv)
    return str(scheduler.get_init_info()["sglang_helix"])


def test_a_scheduler_does_not_start_with_a_broken_exchange(ready: Fresh, tmp_path: Path) -> None:
    model = make_checkpoint("deepseek_v2", tmp_path / "model", num_hidden_layers=2)
    argv = command_line(model, 2, "--dcp-size", "2", "--dcp-comm-backend", "a2a")
    for outcome in ready.outcomes([(started_broken, rank, argv) for rank in range(2)]):
        assert outcome.status == 1
        [said] = [line for line in outcome.output.splitlines() if "SeriesError: " in line]
        assert "--dcp-comm-backend a2a does not give" in said
        assert "(rank 1: rows of " in said
        assert "rank 0:" not in said
    argv = command_line(model, 2, "--dcp-size", "2", "--dcp-comm-backend", "a2a")
    for outcome in ready.outcomes([(started, rank, argv) for rank in range(2)]):
        assert outcome.status == 0, outcome.output
        said = [line for line in outcome.output.splitlines() if "what its reference gives" in line]
        assert float(said[0].rpartition("(")[2].removesuffix(" s)")) < 2
