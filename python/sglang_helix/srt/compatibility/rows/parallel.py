"""Rows: other ways to divide the work, and machines."""

from __future__ import annotations

from sglang_helix.srt.compatibility.conditions import (
    flag,
    more_than_one,
    not_of_mla,
    on_platform,
)
from sglang_helix.srt.compatibility.row import WITHOUT, Given, Row
from sglang_helix.srt.compatibility.situation import Situation
from sglang_helix.srt.distributed.topology import divisors

# What the series has not tried beside attention data parallelism.
_UNTRIED = (
    "drafts, windows, recurrent states, pipelines, several nodes, host caches, disaggregation, "
    "mixed chunks, exchanges but a2a and ag_rs, --dcp-replicate-v-proj, expert parallelism, "
    "--moe-a2a-backend, --moe-dense-tp-size, --enable-dp-lm-head and "
    "--enable-dp-attention-local-control-broadcast"
)


def _untried(situation: Situation) -> bool:
    args = situation.args
    return bool(
        args.speculative_algorithm
        or situation.windows
        or situation.cut_windows
        or situation.hybrid is not None
        or args.pp_size > 1
        or args.nnodes > 1
        or args.enable_hierarchical_cache
        or args.disaggregation_mode not in ("null", None)
        or args.enable_mixed_chunk
        or args.dcp_comm_backend not in ("a2a", "ag_rs", None)
        or situation.replicates_v_proj
        or args.ep_size > 1
        or args.moe_a2a_backend not in ("none", None)
        or args.moe_dense_tp_size is not None
        or args.enable_dp_lm_head
        or args.enable_dp_attention_local_control_broadcast
    )


def _served_in_replicas(situation: Situation, dcp_size: int) -> str:
    """By whom attention replicas are served with a `--dcp-size`: a status of a row, or "untried".

    Only SGLang serves what the series has not tried, where it would answer right.
    """
    if situation.attention_ranks % dcp_size:
        return "refused"
    if situation.fits(dcp_size) and not _untried(situation):
        return "works"
    if situation.sglang_groups_heads_of(dcp_size):
        return "own"
    return "untried" if situation.fits(dcp_size) else "refused"


def _attention_replicas(served: str) -> Given:
    def replicas(situation: Situation) -> object | None:
        args = situation.args
        by_whom = args.attn_dp_size > 1 and _served_in_replicas(situation, args.dcp_size)
        return args.attn_dp_size if by_whom == served else None

    return replicas


def _sizes_in_replicas(situation: Situation) -> list[int]:
    """Every `--dcp-size` that is served in attention replicas of that many ranks."""
    sizes = divisors(situation.attention_ranks)[1:]
    return [size for size in sizes if _served_in_replicas(situation, size) in ("works", "own")]


def values_first(situation: Situation) -> object | None:
    """Asked for, by `--dcp-replicate-v-proj`."""
    return situation.replicates_v_proj or None


def _values_first_by_sglang(situation: Situation) -> object | None:
    return (situation.replicates_v_proj and situation.args.dcp_comm_backend == "fi_a2a") or None


def _platform_of_sglang(situation: Situation) -> object | None:
    return on_platform("hip", "npu", "xpu")


def _platform_of_nobody(situation: Situation) -> object | None:
    return on_platform("musa", "mps")


_ONE_GROUP = "use --tp-size and --dcp-size alone"


PARALLEL: tuple[Row, ...] = (
    Row("replicated query projection", "--dcp-replicate-q-proj", "works", "end-to-end matrix"),
    Row(
        "value projection before the exchange, of MLA",
        "--dcp-replicate-v-proj",
        "works",
        "tokens of transformers on both sides of the switch; timed between two H200s",
        alone="lacks",
    ),
    Row(
        "value projection before FlashInfer's all-to-all",
        "--dcp-replicate-v-proj",
        "refused",
        "SGLang's fi_a2a exchanges latents",
        "Use --dcp-comm-backend a2a or symm, or leave the flag out",
        _values_first_by_sglang,
        alone="lacks",
    ),
    Row(
        "value projection before the exchange, of GQA and MHA models",
        "--dcp-replicate-v-proj",
        "refused",
        "only MLA projects values behind attention",
        "Leave the flag out",
        not_of_mla(values_first),
        alone="lacks",
    ),
    Row("pipeline parallelism", "--pp-size", "works", "end-to-end test, two stages of two ranks"),
    Row("several nodes", "--nnodes", "works", "two nodes answer as transformers, GQA and MLA"),
    Row("expert parallelism", "--ep-size", "works", "answers equal plain TP, MLA"),
    Row("data-parallel replicas", "--dp-size", "works", "two replicas of two ranks, MLA"),
    Row(
        "attention data parallelism",
        "--attn-dp-size",
        "works",
        "two replicas of two and four ranks, also idle ones, GQA and MLA",
    ),
    Row(
        "attention data parallelism of MLA models and Qwen3.5 beside what is untried",
        "--attn-dp-size",
        "own",
        f"the series has not tried it beside {_UNTRIED}; GQA too, where what is left of head "
        "shards is a multiple of the key-value heads",
        given=_attention_replicas("own"),
        alone="serves",
        proof="arg_groups/parallel_hook.py",
    ),
    Row(
        "attention data parallelism beside what is untried",
        "--attn-dp-size",
        "refused",
        f"it has not been tried beside {_UNTRIED}",
        f"Leave those out, or {_ONE_GROUP}",
        _attention_replicas("untried"),
        alone="wrong",
        proof="sgl-project/sglang#34355",
        sizes=_sizes_in_replicas,
    ),
    Row(
        "other attention data parallelism",
        "--attn-dp-size",
        "refused",
        "dcp size does not divide the ranks of a replica, tp size / attn dp size, or the heads "
        "cannot be shared among them",
        f"Instead, {_ONE_GROUP}",
        _attention_replicas("refused"),
        alone="wrong",
        proof="sgl-project/sglang#34355",
        sizes=_sizes_in_replicas,
    ),
    Row(
        "prefill context parallelism",
        "--attn-cp-size",
        "refused",
        "the two divide the sequence differently",
        f"Instead, {_ONE_GROUP}",
        more_than_one("attn_cp_size"),
    ),
    Row(
        "elastic expert parallelism",
        "--elastic-ep-backend",
        "refused",
        "KVP groups are fixed at start",
        WITHOUT,
        flag("elastic_ep_backend"),
    ),
    Row(
        "Ray",
        "--use-ray",
        "refused",
        "its scheduler actors do not load plugins, so ranks would run without the series",
        WITHOUT,
        flag("use_ray"),
    ),
    Row(
        "AMD, Ascend and Intel accelerators",
        "platform",
        "own",
        "the series has never been tried there; SGLang has MLA by aiter, DSA on NPUs, GQA on XPUs",
        given=_platform_of_sglang,
        alone="serves",
        proof="layers/attention/aiter_backend.py, xpu_backend.py, hardware_backend/npu",
    ),
    Row(
        "other accelerators",
        "platform",
        "refused",
        "SGLang builds no decode-context-parallel group there",
        "Leave --dcp-size out",
        _platform_of_nobody,
        alone="refuses",
    ),
)
