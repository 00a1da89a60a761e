"""Quantized projections under the sharding of heads: every shard a slice of the full tensor.

Each rank builds SGLang's own projections inside `heads_shared_by`, loads a checkpoint's full
tensors into them with SGLang's own weight loaders, and compares weights and scales with slices.
"""

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from sglang_cpu_reference.checkpoints import make_checkpoint
from sglang_cpu_reference.server import free_port
from srt.fresh import Fresh
from srt.rank import become_rank

BLOCK = 128
HIDDEN = 256
HEADS = 8
FP8 = torch.float8_e4m3fn
SIZES = (4, 8)
KV_HEADS = (1, 2, 4, 8)
# Head widths: a head as wide as a block, and two heads in a block.
WIDTHS = (128, 64)


def layouts(n: int) -> Iterator[tuple[int, int, int, bool]]:
    """K, key-value heads, head width, replicated queries: all that N ranks allow."""
    for k, kv, width, queries in product((2, 4, 8), KV_HEADS, WIDTHS, (False, True)):
        a = n // k
        if n % k == 0 and not (kv % a and a % kv):
            yield k, kv, width, queries


def fits(n: int, k: int, kv: int, width: int, queries: bool) -> bool:
    """Whether every shard is whole blocks: of q, of k and v, and of the output projection."""
    shares = (HEADS // (n // k if queries else n), max(1, kv // (n // k)), HEADS // n)
    return all(heads * width % BLOCK == 0 for heads in shares)


def wrong_shards(rank: int, n: int, argv: list[str]) -> list[str]:
    """What differs on this rank from the slices that the layout asks for, or fails to be built."""
    become_rank(rank, argv)
    from sglang.srt.layers.linear import QKVParallelLinear, RowParallelLinear
    from sglang.srt.layers.quantization.fp8 import Fp8Config
    from sglang_helix.srt.layers.linear import heads_shared_by

    wrong = []
    for k, kv, width, queries in layouts(n):
        for block in (None, [BLOCK, BLOCK]):
            case = f"N {n} K {k} KV {kv} D {width} replicated {queries} block {block}"
            quantization = Fp8Config(is_checkpoint_fp8_serialized=True, weight_block_size=block)
            try:
                with heads_shared_by(k, (HEADS, kv), queries=queries):
                    qkv = QKVParallelLinear(
                        HIDDEN, width, HEADS, kv, bias=False, quant_config=quantization
                    )
                    output = RowParallelLinear(
                        HEADS * width, HIDDEN, bias=False, quant_config=quantization
                    )
            except ValueError as error:
                refused = "not divisible by weight quantization block" in str(error)
                if fits(n, k, kv, width, queries) or not refused:
                    wrong.append(f"{case}: {error}")
                continue
            if block and not fits(n, k, kv, width, queries):
                wrong.append(f"{case}: built, though its shards are not whole blocks")
                continue
            shards = n // k if queries else n
            own = {
                "q": slice_of(rank * shards // n, shards, HEADS),
                "k": slice_of(rank * (n // k) // n, n // k, kv),
                "v": slice_of(rank * (n // k) // n, n // k, kv),
            }
            if found := check_qkv(qkv, own, kv, width, block is not None):
                wrong.append(f"{case}: {found}")
            if found := check_output(output, rank, n, width, block is not None):
                wrong.append(f"{case}: {found}")
    return wrong


def slice_of(shard: int, shards: int, heads: int) -> slice:
    """The heads of one of `shards` shards; where there are fewer heads, one is shared."""
    count = max(1, heads // shards)
    first = shard * heads // shards
    return slice(first, first + count)


def check_qkv(qkv: Any, own: dict[str, slice], kv: int, width: int, block: bool) -> str | None:
    weights, scales = [], []
    for number, (shard, heads) in enumerate(own.items()):
        total = HEADS if shard == "q" else kv
        weight = torch.randn(total * width, HIDDEN).to(FP8)
        rows = slice(heads.start * width, heads.stop * width)
        load(qkv.weight, weight, shard)
        weights.append(weight[rows])
        if block:
            scale = torch.rand(total * width // BLOCK, HIDDEN // BLOCK)
            load(qkv.weight_scale_inv, scale, shard)
            scales.append(scale[rows.start // BLOCK : rows.stop // BLOCK])
        else:
            scale = torch.tensor(float(number + 1))
            load(qkv.weight_scale, scale, shard)
            scales.append(scale[None])
    if not equal(qkv.weight, torch.cat(weights)):
        return "qkv weight"
    found = qkv.weight_scale_inv if block else qkv.weight_scale
    return None if torch.equal(found, torch.cat(scales)) else "qkv scale"


def check_output(output: Any, rank: int, n: int, width: int, block: bool) -> str | None:
    weight = torch.randn(HIDDEN, HEADS * width).to(FP8)
    load(output.weight, weight)
    if not equal(output.weight, weight.chunk(n, dim=1)[rank]):
        return "output weight"
    if block:
        scale = torch.rand(HIDDEN // BLOCK, HEADS * width // BLOCK)
        load(output.weight_scale_inv, scale)
        right = torch.equal(output.weight_scale_inv, scale.chunk(n, dim=1)[rank])
    else:
        scale = torch.tensor(3.0)
        load(output.weight_scale, scale)
        right = torch.equal(output.weight_scale, scale[None])
    return None if right else "output scale"


def load(parameter: Any, full: torch.Tensor, *shard: str) -> None:
    parameter.weight_loader(parameter, full, *shard)


def equal(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return torch.equal(found.view(torch.uint8), wanted.contiguous().view(torch.uint8))


@pytest.mark.parametrize("n", SIZES)
def test_fp8_shards_are_slices(ready: Fresh, tmp_path: Path, n: int) -> None:
    model = make_checkpoint("llama", tmp_path)
    argv = [
        *("--model-path", str(model), "--tp-size", str(n), "--dcp-size", "2"),
        *("--nccl-port", str(free_port())),
    ]
    for rank, wrong in enumerate(ready.ranks(wrong_shards, n, n, argv)):
        assert not wrong, f"rank {rank}: {wrong}"
