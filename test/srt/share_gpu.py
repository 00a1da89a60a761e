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
# Peer copies between GPUs, which ranks of one GPU have none of. The fused all-reduce is what SGLang
# turns on by itself, for DeepSeek-V3, gpt-oss and others.
FLAGS = ("--disable-custom-all-reduce", "--enforce-disable-flashinfer-allreduce-fusion")


def share() -> None:
    """Have the ranks that this process starts use the first device that it sees."""
    from sglang.srt.platforms.cuda import CudaDeviceMixin

    @contextlib.contextmanager
    def first_device(self: object, device_id: int) -> Iterator[int]:
        yield 0

    CudaDeviceMixin.reindex_device_id = first_device


# The controller of attention replicas is spawned, and starts their ranks: spawning runs the main
# module again under another name.
if __name__ in ("__main__", "__mp_main__"):
    os.environ.update(ENVIRONMENT)
    share()
if __name__ == "__main__":
    runpy.run_module("sglang.launch_server", run_name="__main__")
