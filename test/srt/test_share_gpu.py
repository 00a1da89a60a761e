"""`share_gpu`, which servers of the GPU tests are launched by, on a machine without any."""

import runpy
from pathlib import Path

from sglang_cpu_reference.checkpoints import make_checkpoint
from sglang_helix.check import told_about
from srt import share_gpu
from srt.fresh import Fresh


def device_of_rank(rank: int) -> int:
    """In a process that is spawned by the launcher: the device that it gives a rank."""
    from sglang.srt.utils import common

    runpy.run_module(share_gpu.__name__, run_name="__mp_main__")  # as spawning does
    from sglang.srt.platforms.cuda import CudaDeviceMixin

    common.current_platform = CudaDeviceMixin()
    with common.maybe_reindex_device_id(rank) as device:
        return device


def test_spawned_processes_start_ranks_on_the_first_device(fresh: Fresh) -> None:
    env = {**share_gpu.ENVIRONMENT, "CUDA_VISIBLE_DEVICES": "0"}
    assert fresh.value(device_of_rank, 3, **env) == 0


def fusion(model: str, flags: tuple[str, ...]) -> str | None:
    """In a process of its own: FlashInfer's fused all-reduce between two GPUs, if any."""
    from sglang.srt.arg_groups.overrides import resolved_view
    from sglang.srt.server_args import prepare_server_args

    with told_about("Hopper"):
        args = prepare_server_args(["--model-path", model, "--device", "cuda", "--tp", "2", *flags])
        args.resolve_once()
        return resolved_view(args).flashinfer_allreduce_fusion_backend


def test_ranks_of_one_device_copy_nothing_between_peers(fresh: Fresh, tmp_path: Path) -> None:
    model = str(make_checkpoint("qwen3_moe", tmp_path))
    assert fresh.value(fusion, model, share_gpu.FLAGS[:1])  # what SGLang does by itself
    assert fresh.value(fusion, model, share_gpu.FLAGS) is None
