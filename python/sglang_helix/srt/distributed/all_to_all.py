"""All-to-all over a SGLang process group: any dtype, any dimensions, uneven splits.

Extends ``sglang.srt.distributed.parallel_state``. Upstream's ``GroupCoordinator.all_to_all_single``
splits evenly, and its custom op exists for accelerator tensors only.
"""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from sglang.srt.distributed import parallel_state
from sglang.srt.distributed.parallel_state import GroupCoordinator


def check_all_to_all(
    output: torch.Tensor,
    input: torch.Tensor,
    rank: int,
    world_size: int,
    output_split_sizes: Sequence[int] | None = None,
    input_split_sizes: Sequence[int] | None = None,
) -> tuple[list[int], list[int]]:
    """Refuse what an all-to-all would exchange wrongly; return how many bytes go where.

    Pure: needs no process group, and synchronises nothing.

    Args:
        output: [rows received, ...], contiguous.
        input: [rows sent, ...], contiguous; same dtype, device and trailing dimensions as output.
        rank: place of the caller in the group.
        world_size: ranks in the group.
        output_split_sizes: rows received from each rank; None: the same number from each.
        input_split_sizes: rows sent to each rank; None: the same number to each.

    Returns:
        Bytes received from each rank and bytes sent to each rank, ``world_size`` numbers each.

    Raises:
        ValueError: dtype, device, shape, contiguity, splits or overlap; names the sizes.
    """
    if input.dtype != output.dtype:
        raise ValueError(
            f"all_to_all_single: input is {input.dtype} but output is {output.dtype}; "
            "both need one dtype."
        )
    if input.device != output.device:
        raise ValueError(
            f"all_to_all_single: input is on {input.device} but output is on {output.device}; "
            "both need one device."
        )
    if input.dim() == 0 or output.dim() == 0 or input.shape[1:] != output.shape[1:]:
        raise ValueError(
            f"all_to_all_single: input {list(input.shape)} and output {list(output.shape)} need "
            "a first dimension to split and the same sizes after it."
        )
    for name, tensor in (("input", input), ("output", output)):
        # The bytes are sent as they lie in memory: a pending conjugation or sign would be lost.
        if not tensor.is_contiguous() or tensor.is_conj() or tensor.is_neg():
            raise ValueError(
                f"all_to_all_single: {name} {list(tensor.shape)} with strides "
                f"{list(tensor.stride())} is not contiguous; pass a contiguous tensor."
            )
    row_bytes = math.prod(input.shape[1:]) * input.element_size()
    received = _bytes_per_rank("output", output, output_split_sizes, world_size, row_bytes)
    sent = _bytes_per_rank("input", input, input_split_sizes, world_size, row_bytes)
    if received[rank] != sent[rank]:
        raise ValueError(
            f"all_to_all_single: rank {rank} sends itself {sent[rank]} bytes of input "
            f"{list(input.shape)} but expects {received[rank]} bytes in output "
            f"{list(output.shape)} (input_split_sizes={input_split_sizes}, "
            f"output_split_sizes={output_split_sizes})."
        )
    overlap = min(input.data_ptr() + sum(sent), output.data_ptr() + sum(received)) - max(
        input.data_ptr(), output.data_ptr()
    )
    if overlap > 0:
        raise ValueError(
            f"all_to_all_single: input ({sum(sent)} bytes) and output ({sum(received)} bytes) "
            f"share {overlap} bytes of memory; pass an output of its own."
        )
    return received, sent


def _bytes_per_rank(
    name: str,
    tensor: torch.Tensor,
    split_sizes: Sequence[int] | None,
    world_size: int,
    row_bytes: int,
) -> list[int]:
    """Bytes of each rank's chunk of ``tensor``, which lie one after the other in rank order."""
    rows = tensor.shape[0]
    if split_sizes is None:
        if rows % world_size:
            raise ValueError(
                f"all_to_all_single: the {rows} rows of {name} {list(tensor.shape)} do not divide "
                f"by {world_size} ranks; pass {name}_split_sizes."
            )
        return [rows // world_size * row_bytes] * world_size
    if len(split_sizes) != world_size:
        raise ValueError(
            f"all_to_all_single: {name}_split_sizes has {len(split_sizes)} entries for "
            f"{world_size} ranks."
        )
    if min(split_sizes) < 0 or sum(split_sizes) != rows:
        raise ValueError(
            f"all_to_all_single: {name}_split_sizes {list(split_sizes)} sum to "
            f"{sum(split_sizes)}; none may be negative and the sum must be the {rows} rows of "
            f"{name} {list(tensor.shape)}."
        )
    return [rows_of_rank * row_bytes for rows_of_rank in split_sizes]


def group_all_to_all_single(
    self: GroupCoordinator,
    output: torch.Tensor,
    input: torch.Tensor,
    output_split_sizes: Sequence[int] | None = None,
    input_split_sizes: Sequence[int] | None = None,
) -> None:
    """Replace ``GroupCoordinator.all_to_all_single``: send chunk i of input to rank i of the group.

    Chunk i of output is what rank i sent here. Chunks are consecutive rows of the first dimension.
    Either every rank of the group passes split sizes or none does.

    Args:
        output: [rows received, ...], any dtype, contiguous; overwritten.
        input: [rows sent, ...], same dtype, device and trailing dimensions, contiguous.
        output_split_sizes: rows received from each rank; None: the same number from each.
        input_split_sizes: rows sent to each rank; None: the same number to each.

    Raises:
        ValueError: see ``check_all_to_all``.
    """
    torch.ops.sglang_helix.all_to_all_single(
        output, input, self.unique_name, output_split_sizes, input_split_sizes
    )


def _all_to_all_single(
    output: torch.Tensor,
    input: torch.Tensor,
    group_name: str,
    output_split_sizes: Sequence[int] | None,
    input_split_sizes: Sequence[int] | None,
) -> None:
    """Body of the custom op; the group goes by name because an op takes no Python object."""
    reference = parallel_state._groups.get(group_name)
    group = reference() if reference is not None else None
    if group is None:
        raise ValueError(f"all_to_all_single: there is no process group {group_name!r} any more.")
    pynccl = group.pynccl_comm
    if pynccl is not None and not pynccl.disabled:
        # Enabled means a CUDA graph is being captured, or prepared for. NCCL may have been told
        # that a communicator never mixes captured and eager calls (NCCL_GRAPH_MIXING_SUPPORT=0,
        # set by SGLang under --dcp-size), so this one serves capture only.
        pynccl.all_to_all_single(output, input, output_split_sizes, input_split_sizes)
        return
    received, sent = check_all_to_all(
        output, input, group.rank_in_group, group.world_size, output_split_sizes, input_split_sizes
    )
    if group.world_size == 1:
        output.copy_(input)
        return
    even = output_split_sizes is None and input_split_sizes is None
    # Called also where this rank has nothing to exchange: a backend counts collectives to tell
    # them apart, and ranks whose counts differ wait for each other for ever.
    dist.all_to_all_single(
        _as_bytes(output),
        _as_bytes(input),
        None if even else received,
        None if even else sent,
        # Tensors of the host go over gloo also in a group of accelerators.
        group=(group.device_group if input.device.type == group.device.type else group.cpu_group),
    )


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """View as [bytes] uint8: backends do not know every dtype (gloo no fp8, NCCL no bool)."""
    return tensor.view(-1).view(torch.uint8)


_OP = "sglang_helix::all_to_all_single"

# Not SGLang's register_custom_op: that one leaves CPU tensors without a kernel. "default" is a
# kernel for every device.
torch.library.define(
    _OP,
    torch.library.infer_schema(_all_to_all_single, mutates_args=["output"]),
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.impl(_OP, "default", _all_to_all_single)


@torch.library.register_fake(_OP)
def _all_to_all_single_fake(*_: object) -> None:
    """Under a tracer the op only writes output, whose shape the caller chose."""
