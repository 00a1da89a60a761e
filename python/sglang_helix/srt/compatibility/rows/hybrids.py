"""Rows: models some of whose layers keep recurrent states."""

from __future__ import annotations

from sglang_helix.srt.compatibility.conditions import disaggregated
from sglang_helix.srt.compatibility.row import Row
from sglang_helix.srt.compatibility.situation import Situation

# Hybrid models that the series serves where plain TP groups their heads.
_HYBRIDS = {
    "BailingMoeV2_5ForCausalLM",
    "FalconH1ForCausalLM",
    "GigaChat35ForCausalLM",
    "GraniteMoeHybridForCausalLM",
    "KimiLinearForCausalLM",
    "Lfm2ForCausalLM",
    "Lfm2MoeForCausalLM",
    "NemotronHForCausalLM",
    "Qwen3NextForCausalLM",
    "Qwen3_5ForCausalLM",
    "Qwen3_5ForConditionalGeneration",
    "Qwen3_5MoeForCausalLM",
    "Qwen3_5MoeForConditionalGeneration",
}


def _states_moved(situation: Situation) -> bool:
    """What else reads or moves recurrent states: none of it is proven over a sharded cache."""
    args = situation.args
    return bool(
        args.speculative_algorithm
        or args.enable_hierarchical_cache
        or args.enable_mixed_chunk
        or args.enable_page_major_kv_layout
        or args.enable_linear_replayssm
        or args.enable_linear_replayssm_spec
        or args.enable_int8_mamba_checkpoint
        or args.mamba_radix_cache_strategy == "extra_buffer_lazy"
        or args.pp_size > 1
        or disaggregated(situation)
    )


def _hybrid_served(situation: Situation) -> bool:
    known = not _HYBRIDS.isdisjoint(situation.model.hf_config.architectures)
    return known and situation.plain_heads_grouped and not _states_moved(situation)


def _hybrid_linear(situation: Situation, *, grouped: bool) -> object | None:
    other = situation.hybrid is not None and not _hybrid_served(situation)
    return (other and situation.sglang_groups_heads == grouped) or None


def _hybrid_linear_grouped(situation: Situation) -> object | None:
    return _hybrid_linear(situation, grouped=True)


def _hybrid_linear_split(situation: Situation) -> object | None:
    return _hybrid_linear(situation, grouped=False)


def _gated_replicas(situation: Situation) -> object | None:
    gated = situation.hybrid is not None and not situation.mla
    return (gated and bool(situation.args.dcp_replicate_q_proj)) or None


def _states_without_snapshots(situation: Situation) -> object | None:
    from sglang.srt.arg_groups.overrides import mamba_extra_buffer_of

    args = situation.args
    if situation.hybrid is None or args.disable_radix_cache or mamba_extra_buffer_of(args):
        return None
    return args.mamba_radix_cache_strategy


def _chunk_without_states(situation: Situation) -> object | None:
    args, states = situation.args, situation.hybrid
    size, page = args.chunked_prefill_size, args.page_size * args.dcp_size
    if states is None or args.disable_radix_cache or size is None or size <= 0:
        return None
    # Cut to whole pages of the tree, then to whole chunks of the kernels.
    chunk = max(getattr(states, "mamba_chunk_size", 64), args.page_size)
    return size if size // page * page < chunk else None


HYBRIDS: tuple[Row, ...] = (
    Row(
        "hybrid linear attention of Qwen3-Next, Qwen3.5, Kimi-Linear, Ring-2.5, Nemotron-H, "
        "Granite-4-H, Falcon-H1, LFM2 and GigaChat-3.5",
        "",
        "works",
        "answers are transformers' (GigaChat-3.5's, which it lacks: SGLang's on one rank), hits "
        "asserted; A a multiple of KV heads, states as in plain TP",
        alone="serves",
        proof="test_kimi_linear_dcp4, test_qwen3p5_triton_dcp; Qwen3-Next starts",
    ),
    Row(
        "replicated queries of hybrid models",
        "",
        "refused",
        "gates beside the queries of some are cut by tp size, and the others have not been tried",
        "Use --dcp-size alone (tp size / attn tp size), or --no-dcp-replicate-q-proj beside "
        "--attn-tp-size",
        _gated_replicas,
        alone="lacks",
    ),
    Row(
        "prefixes of hybrid models without snapshots of states",
        "--mamba-radix-cache-strategy",
        "refused",
        "a state is then kept for the end of a request alone, which is no page of the group",
        "Use --disable-radix-cache, or extra_buffer where the model has it",
        _states_without_snapshots,
        alone="refuses",
    ),
    Row(
        "prefill chunk of hybrid models shorter than a chunk of their kernels",
        "--chunked-prefill-size",
        "refused",
        "chunks are cut to whole widened pages and to whole chunks of the kernels that make states",
        "Use a larger chunk, or a smaller --page-size",
        _chunk_without_states,
        alone="refuses",
    ),
    Row(
        "other hybrid linear attention of MLA, of Qwen3.5 and where A is a multiple of KV heads; "
        "what else moves states",
        "",
        "own",
        "recurrent states stay as under plain TP; GQA by --attention-backend triton; speculative "
        "decoding, the hierarchical cache, mixed chunks, pipeline stages and disaggregation",
        given=_hybrid_linear_grouped,
        alone="serves",
        proof="test_kimi_linear_dcp4, test_qwen3p5_triton_dcp; models/kimi_k3.py",
    ),
    Row(
        "other hybrid linear attention",
        "",
        "refused",
        "the ranks of a group would hold different key-value heads",
        "Serve this model without --dcp-size, or with a smaller one",
        _hybrid_linear_split,
        alone="wrong",
        proof="sgl-project/sglang#34355",
    ),
)
