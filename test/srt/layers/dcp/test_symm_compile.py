"""What the compilers make of the one-kernel exchange, read from machine code; needs no GPU."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton
from sglang_helix.srt.layers.dcp import lse_combine_triton, symm, symm_launch
from sglang_helix.srt.layers.dcp.symm_layout import Layout, QueryLayout
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

pytestmark = pytest.mark.skipif(
    symm._INTERPRETED.value, reason="the interpreter leaves nothing to compile"
)

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
MLA = Layout(8, 128, 512, torch.bfloat16, max_tokens=256)
GQA = Layout(8, 64, 128, torch.bfloat16, max_tokens=256)
SCALARS = {"v_scale": "fp32"}  # all others are int32


def instructions(
    layout: Layout, folder: Path, sm: int, *, splits: bool = False, masked: bool = False
) -> tuple[Counter[str], str]:
    """Machine instructions by name, and the assembler's report, for one rank's kernel."""
    constants = {**layout.constants, "SPLITS": splits, "BASE2": False}
    payload = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}[layout.wire]
    pointers: dict[str, str | None] = {
        "x_ptr": "*fp32" if splits else payload,
        "l_ptr": "*fp32",
        "peers_ptr": "*i64",
        "epochs_ptr": "*i64",
        "y_ptr": payload,
        "y_lse_ptr": "*fp32",
        "status_ptr": "*i64",
        "indptr_ptr": "*i32" if splits else None,
        "counts_ptr": "*i32" if splits else None,
        "empty_ptr": "*i1" if masked else None,
        "sink_ptr": None,
    }
    return compiled_for(symm.exchange_kernel, constants, pointers, layout.warps(splits), folder, sm)


def compiled_for(
    kernel: Any,
    constants: dict[str, Any],
    pointers: dict[str, str | None],
    warps: int,
    folder: Path,
    sm: int,
) -> tuple[Counter[str], str]:
    """Of a kernel whose other arguments are numbers; a pointer without a type is not given."""
    constants["PHASE"] = symm.SEND | symm.RECEIVE
    signature, aligned = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in pointers and pointers[name] is None:
            constants[name] = None
        if name in constants:
            signature[name] = "constexpr"
        else:
            signature[name] = pointers.get(name) or SCALARS.get(name, "i32")
        if signature[name].startswith("*"):
            aligned[(index,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, aligned),
        target=GPUTarget("cuda", sm, 32),
        options={"num_warps": warps, "maxnreg": symm_launch._MAX_REGISTERS},
    )
    return machine_code(compiled, folder)


def machine_code(compiled: Any, folder: Path) -> tuple[Counter[str], str]:
    (folder / "kernel.cubin").write_bytes(compiled.asm["cubin"])

    def dump(option: str) -> str:
        command = [CUOBJDUMP, option, folder / "kernel.cubin"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    instruction = r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]+)"
    return Counter(re.findall(instruction, dump("-sass"), re.M)), dump("-res-usage")


def matching(counts: Counter[str], pattern: str) -> int:
    return sum(count for name, count in counts.items() if re.fullmatch(pattern, name))


@pytest.mark.parametrize("sm", [90, 100])
@pytest.mark.parametrize("ranks", [4, 8])
def test_machine_code_of_either_order(ranks: int, sm: int, tmp_path: Path) -> None:
    """As much is sent in one place of the code: the two loops are not copied."""
    for ahead in (False, True):
        layout = replace(MLA, ranks=ranks, ahead=ahead)
        counts, report = instructions(layout, tmp_path, sm)
        vectors = ranks * layout.row_bytes // 16 // (32 * layout.warps(False))
        assert_one_trip(counts, report, vectors)


@pytest.mark.parametrize("sm", [90, 100])
@pytest.mark.parametrize("layout", [MLA, GQA], ids=["mla", "gqa"])
@pytest.mark.parametrize("splits", [False, True], ids=["rows", "splits"])
def test_machine_code(layout: Layout, splits: bool, sm: int, tmp_path: Path) -> None:
    counts, report = instructions(layout, tmp_path, sm, splits=splits)
    vectors = layout.ranks * layout.row_bytes // 16 // (32 * layout.warps(splits))
    assert_one_trip(counts, report, vectors)


@pytest.mark.parametrize("sm", [90, 100])
@pytest.mark.parametrize(
    ("widths", "ranks"), [((512, 64), 4), ((512, 64), 8), ((128,), 2), ((128,), 8)]
)
def test_machine_code_of_the_gather(
    widths: tuple[int, ...], ranks: int, sm: int, tmp_path: Path
) -> None:
    layout = QueryLayout(ranks, 64, widths, torch.bfloat16, max_tokens=256)
    right = "*bf16" if len(widths) == 2 else None
    pointers = {"left_ptr": "*bf16", "right_ptr": right, "y_ptr": "*bf16"}
    pointers |= {"peers_ptr": "*i64", "epochs_ptr": "*i64", "status_ptr": "*i64"}
    counts, report = compiled_for(
        symm.gather_kernel, {**layout.constants}, pointers, layout.warps, tmp_path, sm
    )
    vectors = sum(ranks * words // 4 // (32 * layout.warps) for words in layout.words)
    assert_one_trip(counts, report, vectors)
    assert counts["STG.E.128"] == 2 * vectors  # the result, and what is put back


@pytest.mark.parametrize("sm", [90, 100])
@pytest.mark.parametrize("layout", [GQA, replace(GQA, ranks=2)], ids=["8 ranks", "2 ranks"])
def test_machine_code_of_masked_rows(layout: Layout, sm: int, tmp_path: Path) -> None:
    """A byte more is loaded for each place in the code that loads an LSE; nothing else is there."""
    loads = r"LDG\.E\.[US]8.*"
    rows, _ = instructions(layout, tmp_path, sm)
    counts, report = instructions(layout, tmp_path, sm, masked=True)
    [byte] = [name for name in counts if re.fullmatch(loads, name)]
    assert counts[byte] == 1
    del counts[byte]
    vectors = layout.ranks * layout.row_bytes // 16 // (32 * layout.warps(False))
    assert_one_trip(counts, report, vectors)
    for kind in (r"LDG.*", r"STG.*"):
        assert matching(counts, kind) == matching(rows, kind)


def assert_one_trip(counts: Counter[str], report: str, vectors: int) -> None:
    """Nothing is spilled, no fence, one 16-byte access per vector of the N pieces."""
    assert re.findall(r"STACK:(\d+)", report) == ["0"]
    assert not matching(counts, r"(LDL|STL).*")
    [registers] = re.findall(r"REG:(\d+)", report)
    assert int(registers) <= symm_launch._MAX_REGISTERS  # what `resident_warps` counts on

    # Sent, received, and put back.
    assert counts["STG.E.128.STRONG.SYS"] == vectors
    assert counts["LDG.E.128.STRONG.SYS"] == 2 * vectors  # the first poll and the loop
    assert matching(counts, r"STG\.E\.128") >= vectors
    assert not matching(counts, "MEMBAR.*")
    assert not matching(counts, r"(LDG|STG)\.E\.[US](8|16).*")
    assert not matching(counts, r"(ATOM|RED\b).*")  # peers may be reached over PCIe


@pytest.mark.parametrize(("splits", "width"), [(8, 128), (512, 128), (66, 512)])
def test_many_splits_are_looped_over(splits: int, width: int, tmp_path: Path) -> None:
    """Neither spilled nor unrolled: the code is no longer for 512 splits than for 8."""
    kernel, (step, columns, warps) = (
        lse_combine_triton._combine_splits_kernel,
        lse_combine_triton._splits_tile(splits, width),
    )
    constants = {"x_d": 1, "X_UNIT": 4, "HEADS": 64, "D": width}
    constants |= {"SPLITS": step, "COLS": columns}
    kinds = {"x_ptr": "*fp32", "l_ptr": "*fp32", "y_ptr": "*bf16", "y_lse_ptr": "*fp32"}
    kinds |= {"indptr_ptr": "*i32", "counts_ptr": "*i32", "scale": "fp32"}
    signature, aligned = {}, {}
    for index, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in constants else kinds.get(name, "i32")
        if signature[name].startswith("*"):
            aligned[(index,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, aligned),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": warps},
    )
    counts, report = machine_code(compiled, tmp_path)
    assert re.findall(r"STACK:(\d+)", report) == ["0"]
    assert not matching(counts, r"(LDL|STL).*")
    assert counts["LDG.E.128"] == step * columns // 4 // (32 * warps)
    assert counts.total() < 1500
