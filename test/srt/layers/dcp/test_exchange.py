"""Every exchange against float64, on several ranks and SGLang's own group objects."""

from typing import Any

import pytest
import torch
from sglang.srt.distributed import parallel_state
from sglang_helix.srt.distributed.all_to_all import group_all_to_all_single
from sglang_helix.srt.layers.dcp.comm import (
    cp_lse_ag_out_rs_mha,
    cp_lse_ag_out_rs_mla,
    dcp_a2a_lse_reduce,
)
from sglang_helix.srt.layers.dcp.exchange import Exchanger, a2a, ag_rs
from srt.distributed.ranks import collective_backend, run_ranks

COLLECTIVES = {"a2a": a2a, "ag_rs": ag_rs}  # symm: test_symm_exchange.py
POISONS = {"nan": float("nan"), "+inf": float("inf"), "-inf": -float("inf")}


def partials(world_size: int, shape: tuple[int, int, int], seed: int) -> tuple[Any, Any]:
    """Outputs [N, B, H, D] and LSEs [N, B, H] with empty shards of every kind."""
    generator = torch.Generator().manual_seed(seed)
    B, H, D = shape
    out = torch.randn(world_size, B, H, D, generator=generator)
    lse = torch.randn(world_size, B, H, generator=generator) * 3
    for number, poison in enumerate(POISONS.values()):
        empty = torch.rand(world_size, B, H, generator=generator) < 0.15
        lse[empty] = poison
        out[empty] = list(POISONS.values())[number - 1]
    if B > 1:
        lse[:, 1], out[:, 1] = -torch.inf, torch.nan  # nobody has a token for this query
    return out, lse


def exact(
    out: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    lse = torch.where(torch.isfinite(lse), lse, -torch.inf).double()
    if sinks is not None:  # a shard more, with no value
        lse = torch.cat([lse, sinks.double().expand(1, *lse.shape[1:])])
        out = torch.cat([out, torch.zeros_like(out[:1])])
    total = torch.logsumexp(lse, 0)
    weight = torch.where(lse == -torch.inf, 0.0, torch.exp(lse - total)).unsqueeze(-1)
    return torch.where(weight > 0, out.double() * weight, 0.0).sum(0), total


def install() -> None:
    """What the platform and the series hook in a server; the ranks of a test have no plugins."""
    parallel_state.GroupCoordinator.all_to_all_single = group_all_to_all_single
    if not torch.cuda.is_available():
        from sglang_cpu_reference.plugin import collectives_on_cpu_tensors

        collectives_on_cpu_tensors()


def exchange_on_rank(rank: int, world_size: int, shapes: list[tuple[int, int, int]]) -> list[str]:
    install()
    group = parallel_state.get_world_group()
    group.exchanger = Exchanger("ag_rs", group)
    wrong = []
    for seed, shape in enumerate(shapes):
        outs, lses = partials(world_size, shape, seed)
        own = slice(rank * shape[1] // world_size, (rank + 1) * shape[1] // world_size)
        want_out, want_lse = (full[:, own] for full in exact(outs, lses))
        out, lse = outs[rank].to(group.device), lses[rank].to(group.device)
        results = {name: run(out.clone(), lse.clone(), group) for name, run in COLLECTIVES.items()}
        lse2 = lse / torch.log(torch.tensor(2.0))
        for name, run in COLLECTIVES.items():
            two, total = run(out.clone(), lse2.clone(), group, base2=True)
            results[f"{name} base 2"] = two, total * torch.log(torch.tensor(2.0))
        # Sinks of the rank's own heads, on each rank: counted once.
        sinks = torch.linspace(-4, 4, shape[1])
        sunk_out, sunk_lse = (full[:, own] for full in exact(outs, lses, sinks))
        mine = sinks[own].to(group.device)
        sunk = {
            name: run(out.clone(), lse.clone(), group, sinks=mine)
            for name, run in COLLECTIVES.items()
        }
        for name, run in COLLECTIVES.items():
            two, total = run(out.clone(), lse2.clone(), group, base2=True, sinks=mine)
            sunk[f"{name} base 2"] = two, total * torch.log(torch.tensor(2.0))
        results["mha"] = cp_lse_ag_out_rs_mha(out.clone(), lse.clone(), group, return_lse=True)
        mla = cp_lse_ag_out_rs_mla(out.clone(), lse2.clone(), group)
        results["mla"] = mla.transpose(0, 1), want_lse.float()
        merged = dcp_a2a_lse_reduce(lambda *_: None, out.clone(), lse.clone(), group)
        results["free a2a"] = merged, want_lse.float()
        checks = [(name, *got, want_out, want_lse) for name, got in results.items()]
        checks += [(f"{name} sinks", *got, sunk_out, sunk_lse) for name, got in sunk.items()]
        for name, got_out, got_lse, wanted, wanted_lse in checks:
            error = (got_out.cpu().double() - wanted).norm() / wanted.norm().clamp_min(1e-9)
            lse_ok = torch.allclose(got_lse.cpu().double(), wanted_lse, atol=1e-5)
            if not (error < 2e-6 and lse_ok and got_out.dtype == out.dtype):
                wrong.append(f"{name} {shape}: error {error:.2e}, lse {'ok' if lse_ok else 'off'}")
    return wrong


@pytest.mark.multi_gpu
@pytest.mark.parametrize("world_size", [2, 3, 4, 8])
def test_exchange_is_exact(world_size: int) -> None:
    shapes = [(1, world_size, 32), (3, 2 * world_size, 80), (5, 4 * world_size, 128)]
    backend = collective_backend(world_size)
    for rank, wrong in enumerate(run_ranks(exchange_on_rank, world_size, shapes, backend=backend)):
        assert not wrong, f"rank {rank}: {wrong}"
