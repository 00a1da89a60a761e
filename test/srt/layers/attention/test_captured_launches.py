"""What a captured decode step has the host launch outside of its graph, for every adapter.

A step of a small batch takes as long as the host does, and each launch is several microseconds of
it. Kernels are stand-ins, or Triton's in the interpreter, and count as one each; so do lists of
pages, which are one on a GPU, and of rows.
"""

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang_helix.srt.layers.attention import owned_rows
from sglang_helix.srt.layers.attention.adapters import Attention, adapter
from sglang_helix.srt.layers.attention.local_pages import LocalPages
from srt.fresh import Fresh
from srt.layers.attention.conformance import CAPTURED, build, parallel, prepare
from srt.layers.attention.launches import Launches
from srt.layers.attention.steps import Heads
from srt.layers.attention.test_launches import LAYER_HEADS, note
from srt.slots import Slots
from srt.threads import ThreadGroup, run_threads
from torch.utils._python_dispatch import _disable_current_modes

RANKS, BATCH = 2, 4


def as_one_launch(owner: Any, name: str, noted_as: str) -> None:
    """Have a function noted as one launch, whatever it does on a CPU."""
    original = getattr(owner, name)

    def noted(*args: Any, **options: Any) -> Any:
        note(noted_as)
        with _disable_current_modes():
            return original(*args, **options)

    setattr(owner, name, noted)


def prepared_on_rank(
    rank: int, group: ThreadGroup, backend: str, heads: Heads, mla: bool
) -> dict[str, list[str]]:
    """What one step launches, of a full batch and of a padded one."""
    page = (adapter(backend).pages or (4,))[0]
    slots = Slots(group.world_size, page, pages=40)
    for request in range(BATCH):
        slots.extend(request, 5 + request)
    adapter_ = build(backend, rank, group, heads, slots, mla)
    adapter_.req_to_token_pool.req_to_token = slots.table()

    def batch(real: int) -> Any:
        lens = torch.tensor([len(slots.of[request]) for request in range(BATCH)])
        return SimpleNamespace(
            forward_mode=ForwardMode.DECODE,
            batch_size=BATCH,
            req_pool_indices=torch.arange(BATCH),
            seq_lens=lens,
            seq_lens_cpu=lens.clone(),
            out_cache_loc=torch.tensor([slots.of[r][-1] for r in range(real)]),
            spec_info=None,
            encoder_lens=None,
            kv_loc_plan=None,
        )

    adapter_.init_cuda_graph_state(8, 8)
    adapter_.init_forward_metadata_out_graph(batch(BATCH), in_capture=True)
    found = {}
    for name, real in {"full": BATCH, "padded": BATCH - 1}.items():
        at_hand = batch(real)
        with Launches() as launches:
            adapter_.init_forward_metadata_out_graph(at_hand)
        found[name] = launches.names
    return found


def prepared(backend: str, attention: Attention) -> dict[str, list[str]]:
    """Of rank 1, in a process of its own."""
    prepare(backend)
    as_one_launch(LocalPages, "fill", "pages")
    as_one_launch(owned_rows, "local_rows", "rows")
    if os.environ.get("TRITON_INTERPRET"):
        from triton.runtime.interpreter import GridExecutor

        as_one_launch(GridExecutor, "__call__", "kernel")
    given = backend, LAYER_HEADS[attention], attention == "MLA"
    return run_threads(prepared_on_rank, RANKS, *given, **parallel(RANKS))[1]


# Where K and V go: of a GQA layer alone, since MLA's store finds the owners in the graph.
WRITES = ["remainder", "eq", "floor_divide", "where"]
READS = {
    ("fa3", "GQA"): ["pages", "get_scheduler_metadata", "copy_"],
    ("flashmla", "MLA"): ["pages", "get_mla_decoding_metadata", "copy_", "copy_"],
    ("trtllm_mha", "GQA"): ["pages", "clamp"],
    # On the host, which plans by it: a plan is of what each request has on this rank.
    ("flashinfer", "GQA"): ["add", "floor_divide", "lift_fresh", "rows"],
}
# Upstream's own metadata of a decode step, but for the tokens that a rank has of each request.
TRITON = ["add", "floor_divide", "cumsum", "copy_", "kernel", "clamp_min", "kernel"]


@pytest.mark.parametrize(("backend", "attention"), CAPTURED)
def test_launches_of_a_step(process: Fresh, backend: str, attention: Attention) -> None:
    """Of arithmetic, what cannot be done once; padded rows take one more to be sent to row 0."""
    writes = WRITES if attention == "GQA" else []
    padded = ["zero_"] if writes else []
    reads = TRITON if backend == "triton" else READS.get((backend, attention), ["pages"])
    found = process.value(prepared, backend, attention)
    assert sorted(found["full"]) == sorted([*writes, *reads])
    assert sorted(found["padded"]) == sorted([*writes, *padded, *reads])
