"""Each exchange once, before anything is served: what its ranks make of partials that all know.
And the gather of queries, where there is one.

An exchange can be wrong on one machine only: a driver, a link, a library of another version. The
ranks then answer, and wrongly. So every rank brings random partials, empty ones among them, and
compares its own heads with what it works out from everybody's, which go by the CPU group and so by
another way. All ranks hear what each of them found, and none goes on where one is wrong.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from sglang_helix.helix import SeriesError
from sglang_helix.srt.layers.dcp.exchange import (
    BACKENDS,
    GATHER_VARIABLE,
    Exchanger,
    Group,
    gathers_by_kernel,
)
from sglang_helix.srt.layers.dcp.gather import all_gather
from sglang_helix.srt.layers.dcp.partial import Masked, Partial, Splits

logger = logging.getLogger(__name__)

_SLOTS = 2  # of `symm`: each is tried
_NOT_BY_KERNEL = f"; or, where only queries are wrong, set {GATHER_VARIABLE}=0"
_BLOCK = 32  # tokens of a split, in the form of splits
_LOG2_E = 1.4426950408889634
# Empty shards, as kernels leave them.
_EMPTY = torch.tensor([-torch.inf, torch.nan, torch.inf])


def probe(
    exchanger: Exchanger,
    everyone: Any,
    *,
    num_heads: int,
    head_dims: Sequence[int],
    dtype: torch.dtype,
    base2: bool,
    form: str = "rows",
    queries: Sequence[tuple[int, ...]] = (),
    max_tokens: int | None = None,
) -> None:
    """Compare what a prepared exchange makes of random partials with a reference. Collective.

    Args:
        exchanger: prepared for such partial outputs.
        everyone: process group on the CPU of all ranks that must hear the verdict.
        num_heads: H, query heads of the whole KVP group.
        head_dims: widths that it was prepared for.
        dtype: of the partial outputs.
        base2: what the decode backend's LSEs are.
        form: of what that backend leaves, besides rows: `Adapter.leaves`.
        queries: widths of the parts of queries that are gathered.
        max_tokens: the largest batch; None where it is not known.

    Raises:
        SeriesError: on every rank, where the results of any are wrong.
    """
    started = time.perf_counter()
    problems, backend = [], exchanger.name
    for head_dim in head_dims:
        for tried in dict.fromkeys(("rows", form)):
            shape = num_heads, head_dim
            if found := _compare(exchanger, tried, shape, dtype, base2, max_tokens):
                problems.append(f"{tried} of {head_dim} elements in {dtype}: {found}")
    for widths in queries:
        if found := _compare_gather(exchanger, num_heads, widths, dtype, max_tokens):
            problems.append(f"gathered queries of {widths} elements in {dtype}: {found}")
    verdicts: list[list[str]] = [[]] * dist.get_world_size(everyone)
    dist.all_gather_object(verdicts, problems, group=everyone)
    if any(verdicts):
        wrong = "; ".join(
            f"rank {rank}: {problem}" for rank, found in enumerate(verdicts) for problem in found
        )
        others = " or ".join(name for name in BACKENDS if name != backend)
        raise SeriesError(
            f"--dcp-comm-backend {backend} does not give what attention over all ranks gives, so "
            f"its answers would be wrong ({wrong}). Give --dcp-comm-backend {others}, and check "
            f"the machine{_NOT_BY_KERNEL if gathers_by_kernel() else ''}"
        )
    logger.info(
        "--dcp-comm-backend %s gives what its reference gives, on every rank (%.2f s)",
        backend,
        time.perf_counter() - started,
    )


def _compare(
    exchanger: Exchanger,
    form: str,
    shape: tuple[int, int],
    dtype: torch.dtype,
    base2: bool,
    max_tokens: int | None,
) -> str:
    """What is wrong with this rank's own heads; empty if nothing is."""
    split, group = form == "splits", exchanger.group
    base2 = base2 and not split  # these are of Triton, natural
    values, lses, lens = _shards(group, shape, 2 if split else 1)
    if not split:
        values = values.to(dtype).float()
    everyones = (_gathered(x, group).chunk(group.world_size, dim=2) for x in (values, lses))
    wanted, wanted_lse = _reference(*(by_owner[group.rank_in_group] for by_owner in everyones))
    outs: list[torch.Tensor] = []
    out_lses: list[torch.Tensor] = []
    raised = ""
    most = max_tokens or len(lens)
    for first in range(0, len(lens), most):
        some = slice(first, first + most)
        shards = values[some], lses[some], lens[some]
        try:
            out, lse = _exchanged(exchanger, form, shards, dtype, base2)
            outs.append(out.cpu().double())
            out_lses.append(lse.cpu().double() / (_LOG2_E if base2 else 1))
        except Exception as error:  # the others wait for this rank in what comes next
            raised = f"it raised {type(error).__name__}: {error}"
    if raised:
        return raised
    got, got_lse = torch.cat(outs), torch.cat(out_lses)
    if got.shape != wanted.shape or got_lse.shape != wanted_lse.shape:
        return f"it is {list(got.shape)} in place of {list(wanted.shape)}"
    # Several roundings of a row, and far from what another row, rank or base would make of it.
    rounding = max(4 * torch.finfo(dtype).eps, 1e-4)
    off = (got - wanted).norm(dim=-1) / wanted.norm(dim=-1).clamp_min(1e-9)
    lse_off = (got_lse - wanted_lse).abs().masked_fill(got_lse == wanted_lse, 0)
    for name, errors, allowed in (("the output", off, rounding), ("the LSE", lse_off, 1e-3)):
        if not bool((errors <= allowed).all()):  # NaN is not
            worst = float(errors.nan_to_num(torch.inf).max())
            return f"{name} is off by {worst:.2g} (at most {allowed:.2g} is rounding)"
    return ""


def _compare_gather(
    exchanger: Exchanger,
    num_heads: int,
    widths: tuple[int, ...],
    dtype: torch.dtype,
    max_tokens: int | None,
) -> str:
    """What is wrong with the queries of all heads that are gathered; empty if nothing is."""
    group, own = exchanger.group, num_heads // exchanger.group.world_size
    generator = torch.Generator().manual_seed(group.rank_in_group)
    # As views of wider rows, which a model's queries are too.
    rows = torch.randn(min(4, max_tokens or 4), own, sum(widths) + 8, generator=generator)
    rows = rows.to(dtype)
    everyones = _gathered(rows.float()[:, :, None], group)[..., : sum(widths)]
    wanted = everyones.transpose(0, 1).flatten(1, 2)
    parts = rows.to(group.device)[..., : sum(widths)].split(widths, dim=-1)
    problem = ""
    for _ in range(_SLOTS):
        try:
            got = all_gather(parts, group).cpu().float()
        except Exception as error:  # the others wait for this rank in what comes next
            problem = f"it raised {type(error).__name__}: {error}"
            continue
        if got.shape != wanted.shape:
            problem = f"it is {list(got.shape)} in place of {list(wanted.shape)}"
        elif wrong := int((got != wanted).any(-1).sum()):
            problem = f"{wrong} of {len(rows) * num_heads} are not what their rank sent"
    return problem


def _shards(
    group: Group, shape: tuple[int, int], count: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Four tokens' partials on the host: [4, H, count, D], LSEs [4, H, count], lengths [4].

    Everybody has keys of the first, only the last place of the second, all others of the third,
    and nobody of the fourth.
    """
    last = group.rank_in_group == group.world_size - 1
    lens = torch.tensor([_BLOCK + 1, int(last), int(not last), 0])
    generator = torch.Generator().manual_seed(group.rank_in_group)
    heads, head_dim = shape
    values = torch.randn(len(lens), heads, count, head_dim, generator=generator)
    lses = 4 * torch.randn(len(lens), heads, count, generator=generator)
    empty = (torch.arange(count) * _BLOCK >= lens[:, None])[:, None].expand_as(lses)
    values[empty] = torch.nan
    poison = _EMPTY[torch.arange(lses.numel()) % len(_EMPTY)].view_as(lses)
    return values, torch.where(empty, poison, lses), lens


def _exchanged(
    exchanger: Exchanger,
    form: str,
    shards: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    dtype: torch.dtype,
    base2: bool,
) -> Partial:
    """This rank's own heads, by the exchange."""
    device, (values, lses, lens) = exchanger.group.device, shards
    if form == "splits":
        indptr = torch.nn.functional.pad(lens.cumsum(0), (1, 0)).to(device, torch.int32)
        counts = torch.full(lens.shape, values.shape[2], dtype=torch.int32, device=device)
        splits = Splits(values.to(device), lses.to(device), indptr, counts, _BLOCK)
        return exchanger(splits, dtype)
    out, lse = values[:, :, 0].to(device, dtype), lses[..., 0].to(device)
    lse = lse * _LOG2_E if base2 else lse
    if form == "rows":
        return exchanger(Partial(out, lse), base2=base2)
    # As if of a token that a kernel attended where there was none.
    unmarked = lse.where(lse.isfinite(), 9.0)
    return exchanger(Masked(out, unmarked, (lens == 0).to(device)), base2=base2)


def _gathered(shards: torch.Tensor, group: Group) -> torch.Tensor:
    """[4, H, count, ...] of each rank -> [ranks * count, 4, H, ...], by the CPU group."""
    each = [torch.empty_like(shards) for _ in range(group.world_size)]
    dist.all_gather(each, shards, group=group.cpu_group)
    return torch.cat([one.movedim(2, 0) for one in each])


def _reference(values: torch.Tensor, lses: torch.Tensor) -> Partial:
    """The softmax identity, in float64: [N, B, h, D] and [N, B, h] -> [B, h, D] and [B, h]."""
    some = lses.isfinite()
    total = lses.double().masked_fill(~some, -torch.inf).logsumexp(0)
    weight = (lses.double() - total).exp().masked_fill(~some, 0)
    out = values.double().masked_fill(~some[..., None], 0) * weight[..., None]
    return Partial(out.sum(0), total)
