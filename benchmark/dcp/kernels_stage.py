"""What `benchmark.dcp kernels` measures with: problems, peers, ranks on one device, buffers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import torch

DTYPE = torch.bfloat16
WARPS_PER_SM = 16  # of `symm`, at the 128 registers that it may take


@dataclass(frozen=True)
class Sizes:
    shape: str
    heads: int
    head_dim: int
    ranks: int
    batch: int

    @property
    def owned(self) -> int:
        """Heads that a rank ends with: h."""
        return self.heads // self.ranks

    def rows(self, heads: int) -> int:
        """Bytes of a batch of rows, payload and LSE."""
        return self.batch * heads * (self.head_dim * DTYPE.itemsize + 4)


@dataclass(frozen=True)
class Problem(Sizes):
    device: torch.device

    def payload(self, heads: int) -> int:
        return self.batch * heads * self.head_dim * DTYPE.itemsize


SHAPES = {"mla": (128, 512), "gqa": (64, 128)}


@dataclass(frozen=True)
class Peers:
    """Modules that could be imported, else None."""

    sglang_kernels: Any = None
    sglang_comm: Any = None
    flashinfer: Any = None
    symm: Any = None


def find_peers(device: torch.device) -> Peers:
    """Import what runs on the device, and say what does not."""
    names = {
        "sglang_kernels": "sglang.kernels.ops.attention.dcp_kernels",
        "sglang_comm": "sglang.srt.layers.dcp.comm",
        "flashinfer": "flashinfer",
        "symm": "sglang_helix.srt.layers.dcp.symm",
    }
    if device.type != "cuda":
        print(f"not measured, for want of a CUDA device: {', '.join(names.values())}")
        return Peers()
    found = {}
    for field, name in names.items():
        try:
            found[field] = import_module(name)
        except ImportError as error:
            print(f"not measured: {name} ({error})")
    return Peers(**found)


class StandIn:
    """A rank's process group whose collectives are copies of what they leave on the rank."""

    rank_in_group = 0

    def __init__(self, lses: torch.Tensor) -> None:
        self.lses = lses
        self.world_size = len(lses)

    def all_to_all_single(self, output: torch.Tensor, input: torch.Tensor) -> None:
        output.copy_(input)

    def all_gather(self, input: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """The only gather in these chains is of LSEs."""
        gathered = torch.empty_like(self.lses)
        self.all_gather_into_tensor(gathered, input)
        return gathered.view(-1, *input.shape[1:])

    def all_gather_into_tensor(self, output: torch.Tensor, input: torch.Tensor) -> None:
        output.copy_(self.lses)

    def all_reduce(self, input: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(input).copy_(input)

    def reduce_scatter_tensor(self, output: torch.Tensor, input: torch.Tensor) -> None:
        output.copy_(input[: len(output)])

    def reduce_scatter_along_dim(self, input: torch.Tensor, dim: int = 0) -> torch.Tensor:
        output = input.new_empty(len(input) // self.world_size, *input.shape[1:])
        self.reduce_scatter_tensor(output, input)
        return output


# Experiments with the kernel of the exchange: attributes of `symm_layout.Layout`, or the
# multiprocessors that it may fill, so that something can run beside it.
VARIANTS: dict[str, dict[str, Any]] = {
    "one row ahead": {"ahead": True},
    "all rows first": {"ahead": False},
    "64 SMs": {"sms": 64},
    "32 SMs": {"sms": 32},
}


def capped(workspace: Any, sms: int | None) -> Any:
    """A workspace whose launches fill so many multiprocessors; of one device, with all ranks."""
    if sms is None:
        return workspace
    return replace(workspace, warps=WARPS_PER_SM * sms // workspace.local_ranks)


def one_kernel(p: Problem, sms: int | None = None, **variant: Any) -> Callable[..., torch.Tensor]:
    """The one-kernel exchange of [N * B, H, D] with all ranks on this device."""
    from sglang_helix.srt.layers.dcp import symm_launch, symm_layout, symm_workspace
    from sglang_helix.srt.layers.dcp.partial import Partial

    layout = symm_layout.Layout(p.ranks, p.heads, p.head_dim, DTYPE, p.batch, **variant)
    workspace = capped(symm_workspace.one_device(layout, p.device), sms)

    def run(x: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
        return symm_launch.exchange(workspace, Partial(x, lse)).out

    return run


def random_partials(p: Problem, shards: int, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    size = (shards, p.batch, heads)
    x = torch.randn((*size, p.head_dim), dtype=DTYPE, device=p.device)
    return x, 3 * torch.randn(size, device=p.device)


def merged(x: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """The combination of [N, B, h, D] in float64."""
    weight = lse.double().softmax(0)[..., None]
    return sum(w * part.double() for w, part in zip(weight, x, strict=True))


def by_owner(x: torch.Tensor, p: Problem) -> torch.Tensor:
    """[B, H, ...] -> [N, B, h, ...]"""
    return x.view(len(x), p.ranks, p.owned, *x.shape[2:]).transpose(0, 1)


def packed_rows(x: torch.Tensor, lse: torch.Tensor, width: int) -> torch.Tensor:
    """uint8 [N, B, h, width]: each row's payload and behind it the LSE."""
    rows = torch.zeros((*lse.shape, width), dtype=torch.uint8, device=x.device)
    size = x.shape[-1] * x.element_size()
    rows[..., :size] = x.view(torch.uint8)
    rows[..., size : size + 4] = lse[..., None].view(torch.uint8)
    return rows


def pack_as_sglang(kernels: Any, x: torch.Tensor, lse: torch.Tensor, ranks: int) -> torch.Tensor:
    """SGLang's send layout: rows of D + 2 elements, the last two of which are the LSE's bits."""
    B, H, D = x.shape
    send = x.new_empty((ranks, B, H // ranks, D + 2))
    kernels.dcp_pack_a2a_send(x, lse, send[..., :D], send.view(torch.float32)[..., -1])
    return send
