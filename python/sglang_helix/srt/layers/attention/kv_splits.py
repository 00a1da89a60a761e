"""How many splits the Triton adapter's decode takes, and the memory that they are left in.

Decode reads each request in splits, one program for each split and tile of heads. Too few programs
leave the device idle (SGLang's 8 splits are 64 programs for one request on 8 KV heads), and more
splits than that are one more partial result each to write and to merge. So the splits of a whole
batch are dealt by what fills the device: the tokens that a rank holds of all requests, shared out
evenly among a given number of programs. A long request among short ones gets more of them.

What a request can get is bounded by the size of its batch, which a captured graph fixes: so one
buffer, as large as the largest of the products, serves every batch.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from sglang.kernels.ops.attention.decode_attention import _MIN_BLOCK_KV
from sglang.srt.runtime_context import get_exec, get_parallel, get_schedule, get_spec
from sglang.srt.utils import get_available_gpu_memory, get_device_core_count

from sglang_helix.srt.configs.model_config import sharded_heads
from sglang_helix.srt.layers.attention.windows import attention_layers, sharded_layers

if TYPE_CHECKING:
    from sglang.srt.model_executor.model_runner import ModelRunner

logger = logging.getLogger(__name__)

# SGLang's default of --triton-attention-num-kv-splits, which it does not tell from the same number
# asked for: it leaves the splits to the adapter.
NOT_ASKED = 8
# Tokens that splits are whole multiples of.
BLOCK = _MIN_BLOCK_KV
# Splits that a request may have in any batch, however large.
_FEWEST = 4
# Splits of one request, at most: what is left of them has to be merged.
_MOST = 512
# The largest request of a batch may take so many times its even share of the programs.
_UNEVEN = 4


class Tile(NamedTuple):
    """What one program of the first decode stage computes at a time, and with what.

    heads: query heads of a tile; the kernel pads fewer, since tensor cores take 16.
    tokens: keys and values that a step reads.
    """

    heads: int = 16
    tokens: int = 32
    warps: int = 4
    stages: int = 2

    def fits(self, heads: int, kv_heads: int) -> bool:
        """Whether so many query heads can be dealt to tiles of one key-value head each.

        So where there are several, the heads on each must fit into one tile or fill some.
        """
        on_each = heads // kv_heads
        return kv_heads == 1 or on_each <= self.heads or on_each % self.heads == 0


class Tuning(NamedTuple):
    """What the number of splits is chosen by.

    programs_per_sm: programs that the tokens of a batch are shared among.
    least_tokens: tokens of a split, at least.
    """

    programs_per_sm: int
    least_tokens: int
    tile: Tile = Tile()


# One multiprocessor holds 6 programs of heads of 128 elements (80 registers a thread), and 2 of
# MLA's (204). MLA's partial results are 4 times as wide, for twice the bytes of a token.
GQA = Tuning(programs_per_sm=16, least_tokens=64)
MLA = Tuning(programs_per_sm=4, least_tokens=128)


@dataclass(frozen=True)
class SplitPlan:
    """Splits for H query heads on G key-value heads.

    Attributes:
        heads: H.
        kv_heads: G.
        programs: what the tokens of a batch are shared among.
        least: tokens of a split, at least.
        most: splits of a request, at most.
        tile: what one program computes.
    """

    heads: int
    kv_heads: int
    programs: int
    least: int
    most: int
    tile: Tile

    @classmethod
    def of(
        cls,
        tuning: Tuning,
        heads: int,
        kv_heads: int,
        *,
        multiprocessors: int,
        local_context: int,
        cap: int | None = None,
    ) -> SplitPlan:
        """The plan for a device and for requests of up to local_context tokens of this rank.

        cap: splits that the user allows a request; None leaves it to the plan.
        """
        programs = tuning.programs_per_sm * max(1, multiprocessors)
        most = min(cap or _MOST, max(1, -(-local_context // tuning.least_tokens)))
        return cls(heads, kv_heads, programs, tuning.least_tokens, most, tuning.tile)

    @property
    def tiles(self) -> int:
        """Programs of one split: tiles of heads that share a key-value head."""
        group = self.heads // self.kv_heads
        return -(-self.heads // min(self.tile.heads, group))

    def capacity(self, batch: int) -> int:
        """S: splits that a request of a batch of this size has, at most."""
        alone = -(-self.programs // self.tiles)
        share = _UNEVEN * self.programs // (batch * self.tiles)
        return min(self.most, alone, max(_FEWEST, share))

    def rows(self, max_batch: int) -> int:
        """Partial results of one head, in the largest of all batches of up to max_batch."""
        return max(batch * self.capacity(batch) for batch in range(1, max_batch + 1))

    def nbytes(self, max_batch: int, width: int, index_rows: int) -> int:
        """Bytes of a `Scratch`."""
        return 4 * self.rows(max_batch) * self.heads * (width + 1) + 8 * index_rows

    def count(self, lens: torch.Tensor, counts: torch.Tensor) -> None:
        """Write the splits of each request to counts [B], from its local length, lens [B].

        One launch and no look at a value from the host, so it may stand in a graph, or before its
        replay. Between 1 (also for a request without tokens) and `capacity(B)`.
        """
        batch = len(lens)
        if batch:
            _count_kernel[(1,)](
                lens,
                counts,
                batch,
                self.programs,
                self.tiles,
                self.least,
                self.capacity(batch),
                BLOCK_KV=BLOCK,
                BATCH=1 << (batch - 1).bit_length(),
            )


class Scratch:
    """Where partial results of splits are left, for every layer and every captured graph alike.

    Args:
        plan: the splits.
        max_batch: requests of a batch, at most; a larger one gets memory of its own.
        width: elements of an output, at most.
        index_rows: rows that captured graphs list, at most: of the largest batch, each request as
            long as a rank's share of the longest context.
    """

    def __init__(
        self,
        plan: SplitPlan,
        max_batch: int,
        width: int,
        index_rows: int,
        device: torch.device | str,
    ) -> None:
        self.plan = plan
        rows = plan.rows(max_batch) * plan.heads
        self.out = torch.empty(rows * width, dtype=torch.float32, device=device)
        self.lse = torch.empty(rows, dtype=torch.float32, device=device)
        self.indices = torch.zeros(index_rows, dtype=torch.int64, device=device)

    def of(self, batch: int, heads: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Out [B, H, S, width] and lse [B, H, S] fp32 of a batch; uninitialised."""
        shape = batch, heads, self.plan.capacity(batch)
        rows = math.prod(shape)
        if rows * width > len(self.out) or rows > len(self.lse):
            out = self.out.new_empty(rows * width)
            return out.view(*shape, width), self.lse.new_empty(shape)
        return self.out[: rows * width].view(*shape, width), self.lse[:rows].view(shape)


def prepare(runner: ModelRunner, captured: int, largest: int) -> Scratch:
    """Allocate what decode leaves between its launches, once for a server.

    Called between the weights and the pool, which is sized by what is left: as large as the pool
    allows it could be too much (DeepSeek-V3 over 8 ranks: 10 to 32 GiB by upstream's formula).

    Args:
        runner: SGLang's, with its model.
        captured: requests of the largest batch that is captured; 0 where none is.
        largest: requests of the largest batch that is captured or may run.

    Raises:
        ValueError: it does not fit beside the weights under --mem-fraction-static.
    """
    parallel, config, kernel = get_parallel(), runner.model_config, get_exec().kernel
    mla = runner.use_mla_backend
    local_context = -(-config.context_len // parallel.attn_dcp_size)
    asked = kernel.triton_attention_num_kv_splits
    if tile := kernel.triton_attention_split_tile_size:
        cap: int | None = -(-local_context // tile)
    else:
        cap = asked if asked != NOT_ASKED else None
    layers, tuning = sharded_layers(runner.model, config), MLA if mla else GQA
    kv_heads = {1} if mla else {layer.tp_k_head_num for layer in layers}
    heads = sharded_heads(config) // parallel.attn_tp_size * parallel.attn_dcp_size
    # Drafts that are verified are heads of their requests, where decode's kernel takes so many.
    folded_heads = heads * (get_spec().speculative_num_draft_tokens or 1)
    if any(tuning.tile.fits(folded_heads, count) for count in kv_heads):
        heads = folded_heads
    plan = SplitPlan.of(
        tuning,
        heads,
        max(kv_heads),
        multiprocessors=get_device_core_count(runner.gpu_id),
        local_context=local_context,
        cap=cap,
    )
    # Windows decode in it too, wherever their pool is.
    widths = (layer.v_head_dim for layer in attention_layers(runner.model))
    width = config.kv_lora_rank if mla else max(widths)
    index_rows = captured * local_context
    size = plan.nbytes(largest, width, index_rows) / 2**30
    slack = runner.pre_model_load_memory * (1 - get_schedule().mem_fraction_static)
    left = get_available_gpu_memory(runner.device, runner.gpu_id) - slack
    if size >= left:
        raise ValueError(
            f"--attention-backend triton: the partial results of decode for batches of up to "
            f"{largest} take {size:.2f} GiB, and the weights leave {left:.2f} GiB under "
            f"--mem-fraction-static {get_schedule().mem_fraction_static}. Lower "
            "--cuda-graph-max-bs-decode, --max-running-requests, --context-length or "
            "--triton-attention-num-kv-splits, or raise --mem-fraction-static"
        )
    logger.info(
        "triton: up to %d splits of a request alone and %d in a batch of %d, in %.1f MiB",
        *(plan.capacity(1), plan.capacity(largest), largest, size * 2**10),
    )
    return Scratch(plan, largest, width, index_rows, runner.device)


@triton.jit(do_not_specialize=["batch", "programs", "tiles", "least", "most"])
def _count_kernel(
    lens_ptr,
    counts_ptr,
    batch,
    programs,
    tiles,
    least,
    most,
    BLOCK_KV: tl.constexpr,
    BATCH: tl.constexpr,
):
    b = tl.arange(0, BATCH)
    lens = tl.load(lens_ptr + b, mask=b < batch, other=0).to(tl.int64)
    share = tl.maximum(tl.cdiv(tl.sum(lens, 0) * tiles, programs), least)
    share = tl.maximum(tl.cdiv(lens, most), share)
    # Whole blocks, as the kernel deals them out: every split that is counted has tokens.
    share = tl.cdiv(share, BLOCK_KV) * BLOCK_KV
    tl.store(counts_ptr + b, tl.maximum(tl.cdiv(lens, share), 1).to(tl.int32), mask=b < batch)
