"""Combine, rescale and pack with Triton and without it: what is compiled, captured and launched."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import Any
from unittest import mock

import pytest
import torch
from sglang_helix.srt.layers.dcp import lse_combine, packed_rows
from sglang_helix.srt.layers.dcp.partial import Partial
from srt.layers.dcp.lse_combine_cases import (
    HAS_TRITON,
    INF,
    compiled_only,
    needs_cuda,
    needs_triton,
)

from benchmark.dcp import measure

if HAS_TRITON:
    from sglang_helix.srt.layers.dcp import lse_combine_triton


def test_imports_and_runs_without_triton() -> None:
    script = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from sglang_helix.srt.layers.dcp import lse_combine as m\n"
        "send = m.pack(torch.ones(2, 4, 8), torch.zeros(2, 4), 2)\n"
        "from sglang_helix.srt.layers.dcp.packed_rows import unpack\n"
        "out = m.combine(*unpack(send, 8, torch.float32))\n"
        "assert out.shape == (2, 2, 8) and (out == 1).all()\n"
        "scaled, total = m.rescale(torch.ones(2, 4, 8), torch.zeros(2, 2, 4), 1)\n"
        "assert scaled.shape == (4, 2, 8) and (scaled == 0.5).all()"
    )
    env = {**os.environ, "TRITON_INTERPRET": "0"}
    subprocess.run([sys.executable, "-c", script], check=True, env=env, timeout=120)


@compiled_only
@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_triton, needs_cuda])]
)
def test_compiles_into_one_graph(device: str) -> None:
    def exchange(out: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, ...]:
        send = lse_combine.pack(out, lse, 4)
        combined = lse_combine.combine(*packed_rows.unpack(send, 64, torch.bfloat16))
        return combined, *lse_combine.rescale(out, lse[None], 0)

    compiled = torch.compile(
        exchange,
        fullgraph=True,
        dynamic=True,
        backend="aot_eager" if device == "cpu" else "inductor",
    )
    for B in (2, 5):
        out = torch.randn(B, 8, 64, device=device).bfloat16()
        lse = torch.randn(B, 8, device=device)
        torch.testing.assert_close(compiled(out, lse), exchange(out, lse), rtol=0, atol=0)


class Recorder:
    """Stands in for a kernel and keeps the arguments it is launched with."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.args: dict[str, Any] = {}
        self.options: dict[str, Any] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            known = self.kernel.arg_names
            self.options = {k: v for k, v in kwargs.items() if k not in known}
            self.args = dict(zip(known, args, strict=False))
            self.args |= {k: v for k, v in kwargs.items() if k in known}

        return launch

    def ptx(self) -> str:
        """The launch compiled for sm_90; needs no device."""
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
        from triton.compiler import compile as compile_source

        pointer = {torch.bfloat16: "*bf16", torch.int16: "*i16", torch.float32: "*fp32"}
        pointer[torch.uint8] = "*u8"
        params = self.kernel.params
        signature = {
            p.name: "constexpr"
            if p.is_constexpr or self.args[p.name] is None
            else pointer[self.args[p.name].dtype]
            if isinstance(self.args[p.name], torch.Tensor)
            else "i32"
            for p in params
        }
        constants = {
            name: self.args[name] for name, kind in signature.items() if kind == "constexpr"
        }
        aligned = {
            (p.num,): [["tt.divisibility", 16]] for p in params if signature[p.name].startswith("*")
        }
        source = ASTSource(self.kernel, signature, constants, aligned)
        return compile_source(source, GPUTarget("cuda", 90, 32), self.options).asm["ptx"]


@needs_triton
@compiled_only
@pytest.mark.parametrize(("D", "h", "N"), [(512, 16, 8), (128, 8, 8), (576, 16, 4), (80, 4, 3)])
def test_kernels_move_vectors(monkeypatch: pytest.MonkeyPatch, D: int, h: int, N: int) -> None:
    """Rows of D+8 elements are no multiple of 16, which is all Triton would find out by itself."""
    out = torch.empty(3, N * h, D, dtype=torch.bfloat16)
    send = torch.empty(N, 3, h, packed_rows.packed_row_bytes(D, out.dtype), dtype=torch.uint8)
    scaled = torch.empty(N * h, 3, D)
    rows = Partial(out[:, :h], torch.empty(3, h))
    for name, launch in {
        "_pack_kernel": lambda: lse_combine_triton.pack(
            out.view(torch.int16), torch.empty(3, N * h), send
        ),
        "_combine_kernel": lambda: lse_combine_triton.combine(
            *packed_rows.unpack(send, D, out.dtype), out[:, :h], None, False, None
        ),
        "_rescale_kernel": lambda: lse_combine_triton.rescale(
            out, torch.empty(N, 3, N * h), 1, scaled, torch.empty(3, N * h), False
        ),
        "_merge_kernel": lambda: lse_combine_triton.merge(
            rows,
            Partial(rows.out[1:], rows.lse[1:]),
            1,
            torch.empty_like(rows[0]),
            None,
            False,
            None,
        ),
    }.items():
        recorder = Recorder(getattr(lse_combine_triton, name))
        monkeypatch.setattr(lse_combine_triton, name, recorder)
        launch()
        ptx = recorder.ptx()
        scalars = re.findall(r"(?:ld|st)\.global\S*\.b16\b", ptx)
        assert not scalars, name
        vectors = re.findall(r"ld\.global\.v[24]\.b32", ptx)
        assert len(vectors) >= (N if name == "_combine_kernel" else 1)
        assert re.search(r"st\.global\.v[24]", ptx)
        assert "bar.sync" not in ptx  # every reduction stays inside a thread


@pytest.mark.gpu
@needs_cuda
@needs_triton
def test_replays_in_a_cuda_graph() -> None:
    out, lse = torch.randn(5, 16, 512, device="cuda").bfloat16(), torch.randn(5, 16, device="cuda")

    def exchange() -> tuple[torch.Tensor, ...]:
        received = packed_rows.unpack(lse_combine.pack(out, lse, 4), 512, out.dtype)
        lses = torch.stack([lse, lse.flip(0)])
        return (
            *lse_combine.combine(*received, return_lse=True),
            *lse_combine.rescale(out, lses, 0),
        )

    exchange()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = exchange()
    for _ in range(3):
        out.normal_()
        lse.normal_()
        lse[1] = -INF
        graph.replay()
        torch.testing.assert_close(got, exchange(), rtol=0, atol=0)


@pytest.mark.gpu
@needs_cuda
@needs_triton
def test_batch_sizes_share_compiled_kernels() -> None:
    def compiled() -> int:
        names = "_combine_kernel", "_pack_kernel", "_rescale_kernel"
        kernels = [getattr(lse_combine_triton, name) for name in names]
        device = torch.cuda.current_device()
        return sum(len(kernel.device_caches[device][0]) for kernel in kernels)

    def exchange(B: int) -> None:
        out, lse = torch.randn(B, 16, 64, device="cuda"), torch.randn(B, 16, device="cuda")
        lse_combine.combine(*packed_rows.unpack(lse_combine.pack(out, lse, 4), 64, out.dtype))
        for rank in range(2):
            lse_combine.rescale(out, torch.stack([lse, lse]), rank)

    exchange(2)
    before = compiled()
    for B in (1, 3, 16, 17, 48, 255, 256, 1000, 30000):
        exchange(B)
    assert compiled() == before


@pytest.mark.gpu
@needs_cuda
@needs_triton
def test_launches_of_the_exchanges() -> None:
    """Both with copies in the place of collectives: two and one, and what they stand between."""
    from sglang_helix.srt.layers.dcp.exchange import BACKENDS

    group = mock.Mock(world_size=4, rank_in_group=1)
    group.all_to_all_single = torch.Tensor.copy_
    group.all_gather_into_tensor = torch.Tensor.copy_
    group.reduce_scatter_tensor = lambda output, input: output.copy_(input[: len(output)])
    out, lse = torch.randn(8, 16, 64, device="cuda").bfloat16(), torch.randn(8, 16, device="cuda")
    for name, count in {"a2a": 3, "ag_rs": 4}.items():
        assert (
            measure.launches(lambda run=BACKENDS[name].collective: run(out, lse, group)[0]) == count
        )
