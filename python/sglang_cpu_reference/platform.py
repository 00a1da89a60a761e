"""The platform: the released SGLang on a CPU, several ranks over gloo, plain torch operations.

Selected by ``SGLANG_PLATFORM=cpu_reference`` and by nothing else. It is a reference for results,
not for speed: one thread a rank, no compiled kernels, no graphs.
"""

from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import PlatformCapabilities, SRTPlatform

from sglang_cpu_reference import speculative

#: What the reference serves with when the user said nothing. Weights and the KV pool of every
#: rank come out of one machine's memory, so the pool is bounded by tokens, not by a fraction.
_DEFAULT_MAX_TOTAL_TOKENS = 16384
_DEFAULT_MEM_FRACTION = 0.1
_DEFAULT_MAX_STATES = 128  # recurrent states of a hybrid model: running ones and prefixes'


class CpuReferencePlatform(CpuDeviceMixin, SRTPlatform):
    """CPU device operations under an out-of-tree identity.

    In-tree ``CPU`` means Intel AMX or Arm kernels of sgl-kernel; the out-of-tree identity leads
    SGLang to its torch-native paths instead.
    """

    _enum = PlatformEnum.OOT
    capabilities = PlatformCapabilities()

    def is_pin_memory_available(self, device: torch.device | None = None) -> bool:
        """Nothing to pin for: host memory is device memory."""
        return False

    def get_default_attention_backend(self) -> str:
        """Name of the attention backend used when the user named none."""
        return "torch_native"

    def get_compile_backend(self, mode: str | None = None) -> str:
        """Run compiled regions as they are."""
        return "eager"

    def apply_server_args_defaults(self, server_args: Any) -> None:
        """Fill what the user left open; SGLang records each assignment as a platform default."""
        if server_args.enable_torch_compile:
            raise ValueError(
                "SGLANG_PLATFORM=cpu_reference compiles nothing; leave --enable-torch-compile out."
            )
        server_args.disable_overlap_schedule = True
        server_args.disable_custom_all_reduce = True
        server_args.sleep_on_idle = True  # idle ranks would each keep a core busy
        if server_args.dtype == "auto":  # SGLang's auto rounds an fp32 checkpoint to fp16
            server_args.dtype = "float32"
        if server_args.mem_fraction_static is None:
            server_args.mem_fraction_static = _DEFAULT_MEM_FRACTION
        if server_args.max_total_tokens is None:
            server_args.max_total_tokens = _DEFAULT_MAX_TOTAL_TOKENS
        if server_args.max_mamba_cache_size is None:
            server_args.max_mamba_cache_size = _DEFAULT_MAX_STATES

    def support_mamba_cache_extra_buffer(self) -> bool:
        """Recurrent states of prefixes are kept beside the running ones, as on CUDA."""
        return True

    def get_speculative_cache_locs_fn(self) -> Callable[..., torch.Tensor]:
        """Slots of the draft tokens, upstream a Triton kernel."""
        return speculative.extend_cache_locs

    def supports_speculative_algorithm(self, algorithm: str) -> bool:
        """Whether drafts of this kind are served."""
        return algorithm in speculative.ALGORITHMS

    def get_group_coordinator_device(self, local_rank: int) -> torch.device:
        """The CPU, for every rank; asked once SGLang's plugins are loaded, before any group."""
        from sglang_cpu_reference import plugin

        plugin.verify()
        return torch.device("cpu")

    def init_backend(self) -> None:
        """In each process that runs a model, before the model exists."""
        torch.set_num_threads(1)
        from sglang.srt.layers.attention.attention_registry import register_attention_backend
        from sglang_helix.srt.layers.attention.attention_registry import (
            create_torch_native_backend,
        )

        from sglang_cpu_reference import (
            kv_transfer,
            linear_attention,
            norms,
            stand_ins,
        )

        kv_transfer.install()
        linear_attention.install_in_rank()
        norms.install_in_rank()
        stand_ins.install()
        register_attention_backend("torch_native")(create_torch_native_backend)
