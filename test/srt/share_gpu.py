"""``python -m srt.share_gpu``: `sglang.launch_server`, all of whose ranks use GPU 0. For tests.

NCCL lets ranks share a GPU from 2.30 on (NCCL_MULTI_RANK_GPU_ENABLE=1). It shows that a layout
works and says nothing of its speed.
"""

import contextlib
import os
import runpy
from collections.abc import Iterator

ENVIRONMENT = {
    "NCCL_MULTI_RANK_GPU_ENABLE": "1",
    # A few blocks per rank and communicator, or ranks fill the GPU and wait for each other.
    "NCCL_MAX_CTAS": "2",
    "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1",
    # Ranks see one another's memory come and go.
    "SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK": "0",
    "SGLANG_ONE_VISIBLE_DEVICE_PER_PROCESS": "1",
    "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
}
# Peer copies between GPUs, which ranks of one GPU have none of.
FLAGS = ("--disable-custom-all-reduce",)


def launch() -> None:
    from sglang.srt.platforms.cuda import CudaDeviceMixin

    @contextlib.contextmanager
    def first_device(self: object, device_id: int) -> Iterator[int]:
        yield 0

    CudaDeviceMixin.reindex_device_id = first_device
    runpy.run_module("sglang.launch_server", run_name="__main__")


if __name__ == "__main__":
    os.environ.update(ENVIRONMENT)
    launch()
