"""The patch series as data: its patches, and by concern in `hooks/` every place of SGLang that each
touches, and why.

One declaration serves four readers: `plugin.py` installs it, ``python -m sglang_helix series``
prints and checks it, the contract test runs the same check, and whoever carries the series to the
next SGLang reads there what each hook is for and when it can go.
"""

from __future__ import annotations

from collections.abc import Iterator

from sglang_helix.hook import Field, Hook, Patch, Stage
from sglang_helix.hooks.attention import ATTENTION
from sglang_helix.hooks.attn_tp import ATTN_TP
from sglang_helix.hooks.disaggregation import DISAGGREGATION
from sglang_helix.hooks.drafts import DRAFTS
from sglang_helix.hooks.exchange import EXCHANGE
from sglang_helix.hooks.heads import HEADS
from sglang_helix.hooks.hicache import HICACHE
from sglang_helix.hooks.launch import LAUNCH
from sglang_helix.hooks.metrics import METRICS
from sglang_helix.hooks.pools import POOLS
from sglang_helix.hooks.qproj import QPROJ
from sglang_helix.hooks.scheduling import SCHEDULING
from sglang_helix.hooks.symm import SYMM

DCP_REPLICATE_V_PROJ = Field(
    name="dcp_replicate_v_proj",
    namespace="parallel",
    after="dcp_replicate_q_proj",
    type=bool,
    flags=("--dcp-replicate-v-proj",),
    help="For MLA over a sharded cache: hold the value projections of all heads of a KVP group on "
    "each of its ranks and, in decode batches that pay for it, project values before the exchange, "
    "which then carries a quarter of the bytes. `python -m sglang_helix layout` says the memory.",
)

ATTENTION_TP_SIZE = Field(
    name="attention_tensor_parallel_size",
    namespace="parallel",
    after="dcp_size",
    type=int,
    flags=("--attention-tensor-parallel-size", "--attn-tp-size"),
    help="Shard the heads of attention over this many ranks in place of all --tp-size ones; the "
    "ranks that hold the same heads split the sequence of the KV cache. --dcp-size becomes tp size "
    "/ attention tp size, and the query projection is replicated; with --no-dcp-replicate-q-proj "
    "queries are gathered. Default: same as --tp-size.",
    metavar="A",
)

SERIES: tuple[Patch, ...] = (
    Patch(
        "a2a",
        "Decode context parallelism over one exchange interface, for every attention backend "
        "that has an adapter, GQA and MLA",
        (*LAUNCH, *EXCHANGE, *ATTENTION, *HEADS, *POOLS, *HICACHE, *SCHEDULING),
    ),
    Patch(
        "qproj",
        "Projections replicated in each KVP group: queries are not gathered, for GQA (the sharding "
        "of QKVParallelLinear in a2a) and MLA, and MLA's values are projected before the exchange",
        QPROJ,
        fields=(DCP_REPLICATE_V_PROJ,),
    ),
    Patch(
        "attn_tp",
        "Attention on fewer head shards than the FFN: --attn-tp-size",
        ATTN_TP,
        fields=(ATTENTION_TP_SIZE,),
    ),
    Patch(
        "symm",
        "The exchange as one kernel over symmetric memory: --dcp-comm-backend symm",
        SYMM,
        modules=tuple(
            f"sglang_helix.srt.layers.dcp.{name}"
            for name in ("symm", "symm_launch", "symm_layout", "symm_workspace")
        ),
    ),
    Patch(
        "drafts",
        "Speculative decoding with draft models: they run plain TP over a whole cache of their own",
        DRAFTS,
    ),
    Patch(
        "disaggregation",
        "Prefill-decode disaggregation by Mooncake of caches that are sharded otherwise on both "
        "sides",
        DISAGGREGATION,
    ),
    Patch(
        "metrics",
        "What an operator sees of a sharded cache beside SGLang's metrics: --enable-metrics",
        METRICS,
    ),
)


def hooks(stage: Stage | None = None) -> Iterator[Hook]:
    """Every hook of the series in order, or those of one stage."""
    for patch in SERIES:
        for hook in patch.hooks:
            if stage is None or hook.stage == stage:
                yield hook
