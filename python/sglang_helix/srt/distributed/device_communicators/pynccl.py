"""All-to-all of SGLang's ctypes NCCL communicator, the one that CUDA graphs capture.

Extends ``sglang.srt.distributed.device_communicators.pynccl``. Upstream's method is right for flat,
evenly split tensors of NCCL's own dtypes, and returns without a word when disabled.
"""

import ctypes
import functools
from collections.abc import Callable, Sequence

import torch
from sglang.srt.distributed.device_communicators.pynccl import PyNcclCommunicator
from sglang.srt.distributed.device_communicators.pynccl_wrapper import (
    NCCLLibrary,
    buffer_type,
    cudaStream_t,
    ncclDataTypeEnum,
)

from sglang_helix.srt.distributed.all_to_all import check_all_to_all

#: First NCCL with ncclAlltoAll, in the encoding of ncclGetVersion.
_ALL_TO_ALL_VERSION = 22800


@functools.cache
def _nccl_all_to_all(library: NCCLLibrary) -> Callable[..., int] | None:
    """Return ``ncclAlltoAll`` of a loaded NCCL, or None where it has none.

    Upstream's wrapper does not export it. Its signature, as in nccl.h: send buffer, receive
    buffer, elements per peer, dtype, communicator, stream.
    """
    function = getattr(library.lib, "ncclAlltoAll", None)
    if function is None or library.ncclGetRawVersion() < _ALL_TO_ALL_VERSION:
        return None
    pointer = ctypes.c_void_p
    function.restype = ctypes.c_int
    function.argtypes = [pointer, pointer, ctypes.c_size_t, ctypes.c_int, pointer, pointer]
    return function


def pynccl_all_to_all_single(
    self: PyNcclCommunicator,
    output: torch.Tensor,
    input: torch.Tensor,
    output_split_sizes: Sequence[int] | None = None,
    input_split_sizes: Sequence[int] | None = None,
    stream: torch.cuda.Stream | None = None,
) -> None:
    """Replace ``PyNcclCommunicator.all_to_all_single``: send chunk i of input to rank i.

    Only enqueues on ``stream``: no allocation, no synchronisation, so a CUDA graph can capture it.
    Either every rank of the group passes split sizes or none does.

    Args:
        output: [rows received, ...], any dtype, contiguous, on the communicator's device.
        input: [rows sent, ...], same dtype and trailing dimensions, contiguous.
        output_split_sizes: rows received from each rank; None: the same number from each.
        input_split_sizes: rows sent to each rank; None: the same number to each.
        stream: where to enqueue; None: the current stream. Ordering against the streams that write
            input and read output is the caller's.

    Raises:
        RuntimeError: the communicator is disabled, or NCCL reports an error.
        ValueError: wrong device; else see ``check_all_to_all``.
    """
    if self.disabled or not self.available:
        raise RuntimeError(
            f"all_to_all_single: the PyNccl communicator of rank {self.rank} of {self.world_size} "
            f"is {'disabled' if self.available else 'not available'}, so output would stay "
            "uninitialised; enable it with change_state(enable=True), or use "
            "GroupCoordinator.all_to_all_single."
        )
    if input.device != self.device:
        raise ValueError(
            f"all_to_all_single: input is on {input.device} but the PyNccl communicator serves "
            f"{self.device}."
        )
    received, sent = check_all_to_all(
        output, input, self.rank, self.world_size, output_split_sizes, input_split_sizes
    )
    nccl = self.nccl
    if stream is None:
        stream = self._resolve_stream()
    stream_handle = cudaStream_t(stream.cuda_stream)
    # Every dtype travels as bytes: upstream's table of NCCL dtypes lacks fp8 and bool.
    dtype = ncclDataTypeEnum.ncclUint8

    # Explicit splits never take this path, even ones: the others' may be uneven, and then some
    # ranks would wait in ncclAlltoAll and some in send and receive.
    if output_split_sizes is None and input_split_sizes is None:
        all_to_all = _nccl_all_to_all(nccl)
        if all_to_all is not None:
            if sent[0]:
                nccl.NCCL_CHECK(
                    all_to_all(
                        buffer_type(input.data_ptr()),
                        buffer_type(output.data_ptr()),
                        sent[0],
                        dtype,
                        self.comm,
                        stream_handle,
                    )
                )
            return

    send_at, receive_at = input.data_ptr(), output.data_ptr()
    nccl.ncclGroupStart()
    try:
        for peer in range(self.world_size):
            if sent[peer]:
                nccl.ncclSend(
                    buffer_type(send_at), sent[peer], dtype, peer, self.comm, stream_handle
                )
            if received[peer]:
                nccl.ncclRecv(
                    buffer_type(receive_at), received[peer], dtype, peer, self.comm, stream_handle
                )
            send_at += sent[peer]
            receive_at += received[peer]
    finally:
        # A group left open would hold back every later collective of this thread.
        nccl.ncclGroupEnd()
