"""`symm` between the ranks of a server on one CPU: its kernels in Triton's interpreter.

A rank's workspace is a file that all ranks of the group map. Programs of a rank wait for those of
others in earnest: each rank is a process. Within one they run in turn, in the same order on all.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import NamedTemporaryFile
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from srt.models.serving import exchanging_by

WARPS = 5  # fewer than rows, as a rule: then programs carry several


@contextmanager
def by_symm(scheduler: Any) -> Iterator[None]:
    """In a rank's process: its scheduler exchanges by `symm`; it fails where nothing did."""
    from sglang.srt.runtime_context import get_parallel
    from sglang_helix.srt.layers.dcp import symm_workspace

    def calls() -> int:
        kernels = get_parallel().dcp_group.exchanger._kernels.values()
        return sum(int(kernel._workspace.epochs.sum()) for kernel in kernels)

    with (
        mock.patch.object(symm_workspace, "between_ranks", between_processes),
        exchanging_by(scheduler, "symm"),
    ):
        before = calls()
        yield
        assert calls() > before


def between_processes(group: Any, layout: Any, device: torch.device) -> Any:
    """As `symm_workspace.between_ranks`."""
    from sglang_helix.srt.layers.dcp.symm_launch import Workspace

    def gathered(value: Any) -> list[Any]:
        values = [None] * group.size()
        dist.all_gather_object(values, value, group=group)
        return values

    def mapped(name: str) -> torch.Tensor:
        return torch.from_file(name, shared=True, size=layout.nbytes, dtype=torch.uint8)

    with NamedTemporaryFile() as file:
        file.truncate(layout.nbytes)
        layout.initialise(mapped(file.name))
        memory = [mapped(name) for name in gathered(file.name)]
        gathered(None)  # all have mapped it
    return Workspace(
        layout,
        peers=torch.tensor([workspace.data_ptr() for workspace in memory]),
        epochs=torch.ones((1, layout.rows), dtype=torch.int64),
        status=torch.zeros(WARPS, dtype=torch.int64),
        rank=group.rank(),
        warps=WARPS,
        memory=memory,
    )
