"""Symmetric memory for `symm`'s kernels, and the thread that notices when one is stuck.

`symm` holds the kernel and its protocol, `symm_launch` calls it; here a KVP group meets, and
allocates one workspace per rank that all ranks can write to.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symm_mem

from sglang_helix.srt.layers.dcp.partial import Masked, Partial, Splits
from sglang_helix.srt.layers.dcp.symm_launch import (
    L,
    Workspace,
    exchange,
    gather,
    resident_warps,
)
from sglang_helix.srt.layers.dcp.symm_layout import Layout, QueryLayout

logger = logging.getLogger(__name__)

_T = TypeVar("_T")
_INSTEAD = "use --dcp-comm-backend a2a instead of symm"
_OVERLAPPING = "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"  # torch's own switch, for tests
_UNKNOWN_LAYER = 0xFFFF
_WATCH_INTERVAL = 1.0  # seconds; a waiting program reports several times in it
_LOOKS = 20  # in an interval, at who waits now


class Stall(NamedTuple):
    """An exchange that makes no progress."""

    rank: int
    """The waiting rank, in the KVP group."""
    peer: int
    """A rank whose rows are missing; -1 where rows are there in part."""
    layer: int
    """0xFFFF where the exchange was not told."""
    epoch: int
    """Calls that the waiting row has been through, from 1, low 31 bits."""

    @classmethod
    def read(cls, rank: int, word: int) -> Stall:
        """Take apart what the kernel reported."""
        return cls(rank, (word & 0xFFFF) - 1, word >> 16 & 0xFFFF, word >> 32 & 0x7FFFFFFF)

    def __str__(self) -> str:
        missing = f"rank {self.peer}"
        if self.peer < 0:
            missing = "what is missing of rows that came in part"
        layer = "a layer" if self.layer == _UNKNOWN_LAYER else f"layer {self.layer}"
        return (
            f"symm exchange is stuck: rank {self.rank} of the KVP group waits in {layer}, "
            f"epoch {self.epoch}, for {missing}"
        )


class Watchdog:
    """Thread that calls ``on_stall`` once a program has waited longer than the timeout.

    The kernel itself waits without a bound: if it gave up, its result would be wrong. Waiting
    programs report to pinned host memory, so watching costs the device nothing.
    """

    def __init__(
        self,
        status: torch.Tensor,
        rank: int,
        timeout: float,
        on_stall: Callable[[Stall], None],
    ):
        self._status, self._rank = status, rank
        self._timeout, self._on_stall = timeout, on_stall
        self.slow_seconds: dict[int, float] = {}
        """By peer: seconds in which a program reported that it waits for that rank's rows."""
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="symm-watchdog", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._stopped.set()
        self._thread.join()

    def _watch(self) -> None:
        before = torch.zeros_like(self._status)
        since = torch.full(self._status.shape, time.monotonic(), dtype=torch.float64)
        while (words := self._reported()) is not None:
            now = time.monotonic()
            # A program that got on reports another epoch, or nothing.
            since = since.masked_fill((words != before) | (words == 0), now)
            oldest = int(since.argmin())
            if now - float(since[oldest]) >= self._timeout:
                self._on_stall(Stall.read(self._rank, int(words[oldest])))
                return
            before = words

    def _reported(self) -> torch.Tensor | None:
        """The last report of each program within an interval; None where the thread is to end."""
        words, look = torch.zeros_like(self._status), _WATCH_INTERVAL / _LOOKS
        for _ in range(_LOOKS):
            if self._stopped.wait(look):
                return None
            seen = self._status.clone()
            if not seen.any():
                continue
            self._status.zero_()
            words = torch.where(seen != 0, seen, words)
            for peer in {
                Stall.read(self._rank, int(word)).peer for word in seen[seen != 0].unique()
            }:
                self.slow_seconds[peer] = self.slow_seconds.get(peer, 0.0) + look
        return words


def abort(stall: Stall) -> None:
    """Say what is stuck and end the process: a server without one of its ranks serves nothing."""
    logger.critical("%s; giving up", stall)
    os.kill(os.getpid(), signal.SIGABRT)


class _Watched(Generic[L]):
    """A rank's end of a kernel between the ranks of a group, and who notices when it is stuck."""

    def __init__(
        self,
        group: dist.ProcessGroup,
        layout: L,
        device: torch.device,
        timeout: float,
        on_stall: Callable[[Stall], None],
    ):
        self.layout = layout
        self._workspace = between_ranks(group, layout, device)
        self._watchdog = Watchdog(self._workspace.status, group.rank(), timeout, on_stall)

    @property
    def max_tokens(self) -> int:
        """Largest batch."""
        return self.layout.max_tokens

    @property
    def slow_seconds(self) -> dict[int, float]:
        """By peer: seconds in which a call waited some milliseconds or longer for its rows."""
        return self._watchdog.slow_seconds

    def close(self) -> None:
        """Stop the watchdog.

        The workspace goes with the object, which must outlive its peers' calls. Freeing it waits
        for the device, and so for ever while a call is stuck.
        """
        self._watchdog.stop()


class SymmExchange(_Watched[Layout]):
    """Partial outputs of a KVP group's heads to each rank's own heads, in one kernel.

    Rank j of K ends with heads [j*h, (j+1)*h), h = ceil(H/K): `symm_layout.Layout.owned_by`. All
    ranks must make the same calls in the same order, and calls on one object must not overlap:
    another stream that runs beside needs another object. Calls may be captured in CUDA graphs and
    launch nothing but the kernel; the first of each kind compiles it, so make it before capturing.

    Construction is collective, allocates the workspace once, and synchronises.

    Args:
        group: the KVP group; a gloo group of the same ranks does.
        max_tokens: the largest batch. Takes `symm_layout.Layout.nbytes` of memory.
        num_heads: H, query heads of a partial output.
        head_dim: D of the output; D * itemsize must be a multiple of 16.
        dtype: bf16, fp16 or fp32: what travels, and the dtype of outputs.
        device: this rank's GPU.
        timeout: seconds after which an exchange counts as stuck.
        on_stall: called from a thread then; by default logs and aborts the process.

    Raises:
        RuntimeError: the group has no peer access, or a rank no memory; raised on every rank, and
            names the backend to use instead.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        max_tokens: int,
        num_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        timeout: float = 300.0,
        on_stall: Callable[[Stall], None] = abort,
    ):
        layout = Layout(group.size(), num_heads, head_dim, dtype, max_tokens)
        super().__init__(group, layout, device, timeout, on_stall)

    def __call__(
        self,
        partial: Partial | Splits | Masked,
        *,
        base2: bool = False,
        sinks: torch.Tensor | None = None,
        head_major: bool = False,
        drafts: int = 1,
        layer: int = -1,
    ) -> Partial:
        """The rank's own heads, see `symm_launch.exchange`; layer: -1 where it is not known."""
        return exchange(
            self._workspace,
            partial,
            base2=base2,
            sinks=sinks,
            head_major=head_major,
            drafts=drafts,
            layer=layer & _UNKNOWN_LAYER,
        )


class SymmGather(_Watched[QueryLayout]):
    """Queries of each rank's own heads to those of a KVP group's heads on all, in one kernel.

    What `SymmExchange` says of calls and of construction holds here too, and so do its arguments;
    widths: elements of the parts of a query, see `symm_layout.QueryLayout`.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        max_tokens: int,
        num_heads: int,
        widths: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        *,
        timeout: float = 300.0,
        on_stall: Callable[[Stall], None] = abort,
    ):
        layout = QueryLayout(group.size(), num_heads, widths, dtype, max_tokens)
        super().__init__(group, layout, device, timeout, on_stall)

    def __call__(self, parts: Sequence[torch.Tensor], *, layer: int = -1) -> torch.Tensor:
        """All heads' queries, see `symm_launch.gather`; layer: -1 where it is not known."""
        return gather(self._workspace, parts, layer=layer & _UNKNOWN_LAYER)


def is_available(group: dist.ProcessGroup) -> str | None:
    """Why the group cannot exchange through symmetric memory, or None. Collective."""
    probes = _gather(group, _Probe.local())
    if len({probe.boot for probe in probes}) > 1:
        hosts = ", ".join(sorted({f"{probe.name}, boot {probe.boot}" for probe in probes}))
        reason: str | None = (
            f"the KVP group spans hosts ({hosts}), and symm needs peer access inside the group"
        )
    else:
        reason = _no_access(probes[group.rank()], probes)
    return next(filter(None, _gather(group, reason)), None)


def _on_every_rank(group: dist.ProcessGroup, step: Callable[[], _T]) -> _T:
    """What a step returns; a RuntimeError of any rank's step becomes one on all. Collective."""
    problem = None
    try:
        result = step()
    except RuntimeError as error:
        problem = f"no symmetric memory on rank {group.rank()} of the KVP group ({error})"
    for failed in filter(None, _gather(group, problem)):
        raise RuntimeError(f"{failed}: {_INSTEAD}")
    return result


def _mapped(handle: Any) -> Any:
    if 0 in handle.buffer_ptrs:
        raise RuntimeError("torch did not map the memory of all ranks")
    return handle


class _Probe(NamedTuple):
    boot: str
    """Which start of which machine: containers of one host share it, whatever they are called."""
    name: str
    gpu: str | None

    @classmethod
    def local(cls) -> _Probe:
        gpu = None
        if torch.cuda.is_available():
            gpu = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return cls(boot, socket.gethostname(), gpu)


def _no_access(mine: _Probe, probes: list[_Probe]) -> str | None:
    if mine.gpu is None:
        return f"symm needs CUDA devices, and a rank on {mine.name} has none"
    visible = {
        str(torch.cuda.get_device_properties(index).uuid): index
        for index in range(torch.cuda.device_count())
    }
    for rank, peer in enumerate(probes):
        if peer is mine or peer.gpu is None:
            continue
        if peer.gpu == mine.gpu:
            if os.environ.get(_OVERLAPPING) != "1":
                return f"ranks of the KVP group share GPU {mine.gpu}"
        elif peer.gpu in visible and not torch.cuda.can_device_access_peer(
            torch.cuda.current_device(), visible[peer.gpu]
        ):
            return f"GPU {mine.gpu} has no peer access to that of rank {rank} of the KVP group"
    return None


def _gather(group: dist.ProcessGroup, value: Any) -> list[Any]:
    values = [None] * group.size()
    dist.all_gather_object(values, value, group=group)
    return values


def between_ranks(group: dist.ProcessGroup, layout: L, device: torch.device) -> Workspace[L]:
    """This rank's end of an exchange, or of a gather, with the other ranks of a group.

    Collective, and synchronises; every rank may make its first call as soon as it returns. Nobody
    watches over it: `SymmExchange` does. Raises RuntimeError on every rank where the layouts
    differ, there is no peer access inside the group, or a rank has no memory.
    """
    for rank, other in enumerate(_gather(group, layout)):
        if other != layout:
            # Pieces would land where the owner does not look for them.
            raise RuntimeError(
                f"ranks of the KVP group lay out symm's memory differently: rank {group.rank()} as "
                f"{layout}, rank {rank} as {other}"
            )
    if reason := is_available(group):
        raise RuntimeError(f"{reason}: {_INSTEAD}")
    buffer = _on_every_rank(
        group, lambda: symm_mem.empty(layout.nbytes, dtype=torch.uint8, device=device)
    )
    handle = _on_every_rank(group, lambda: _mapped(symm_mem.rendezvous(buffer, group)))
    # Peers' addresses are those of what torch allocated there; a buffer may lie inside of it.
    offsets = _gather(group, getattr(handle, "offset", 0))  # absent where torch has no pools
    pointers = [base + at for base, at in zip(handle.buffer_ptrs, offsets, strict=True)]
    pointers[group.rank()] = buffer.data_ptr()
    layout.initialise(buffer)
    handle.barrier()
    torch.cuda.synchronize(device)
    warps = resident_warps(device)
    return Workspace(
        layout,
        peers=torch.tensor(pointers, dtype=torch.int64, device=device),
        epochs=torch.ones((1, layout.rows), dtype=torch.int64, device=device),
        status=torch.zeros(warps, dtype=torch.int64, pin_memory=True),
        rank=group.rank(),
        warps=warps,
        memory=(buffer, handle),
    )


def one_device(layout: L, device: torch.device, warps: int | None = None) -> Workspace[L]:
    """All ranks of an exchange on one device, for proofs and measurements without a group.

    `symm_launch.exchange` then plays all ranks in one launch and takes their batches stacked:
    out [N*B, H, D] and lse [N*B, H] -> [N*B, h, D]; so does `gather`, [N*T, h, W] -> [N*T, H, W].
    """
    buffers = torch.empty((layout.ranks, layout.nbytes), dtype=torch.uint8, device=device)
    for buffer in buffers:
        layout.initialise(buffer)
    if warps is None:
        warps = resident_warps(device, layout.ranks)
    peers = torch.tensor([b.data_ptr() for b in buffers], dtype=torch.int64, device=device)
    epochs = torch.ones((layout.ranks, layout.rows), dtype=torch.int64, device=device)
    status = torch.zeros(layout.ranks * warps, dtype=torch.int64, pin_memory=peers.is_cuda)
    return Workspace(layout, peers, epochs, status, 0, warps, buffers, layout.ranks)
