"""Rows: speculative decoding."""

from __future__ import annotations

from sglang_helix.srt.compatibility.conditions import disaggregated, flag, more_than_one
from sglang_helix.srt.compatibility.row import WITHOUT, Given, Row
from sglang_helix.srt.compatibility.rows.execution import graph
from sglang_helix.srt.compatibility.situation import Situation
from sglang_helix.srt.layers.attention.adapters import ADAPTERS

# NEXTN is another name of EAGLE.
_DRAFT_MODELS = ("EAGLE", "EAGLE3", "NEXTN", "STANDALONE")


def _draft_model(situation: Situation, *, own: bool) -> object | None:
    """A draft model that SGLang serves beside a sharded cache, or one that it does not."""
    from sglang.srt.arg_groups.overrides import attention_backends_of
    from sglang.srt.configs.model_config import is_qwen3_5

    asked = situation.args.speculative_algorithm
    if asked in (None, "NGRAM"):
        return None
    verified = asked not in _DRAFT_MODELS or "cutedsl_mla" in attention_backends_of(situation.args)
    served = situation.dsa or is_qwen3_5(situation.model.hf_config) or (situation.mla and verified)
    return asked if served == own else None


def _draft_of_sglang(situation: Situation) -> object | None:
    return _draft_model(situation, own=True)


def _other_draft(situation: Situation) -> object | None:
    asked = _draft_model(situation, own=False)
    return None if asked in _DRAFT_MODELS else asked


def _drafts(given: Given) -> Given:
    return lambda situation: given(situation) if situation.args.speculative_algorithm else None


def _draft_models(
    given: Given,
) -> Given:
    asked = _drafts(given)
    return lambda situation: (
        None if situation.args.speculative_algorithm == "NGRAM" else asked(situation)
    )


def _tree(situation: Situation) -> object | None:
    """Trees of drafts, unless a backend reads them whose pages are known to be the allocator's."""
    from sglang.srt.arg_groups.overrides import attention_backends_of

    args = situation.args
    topk = args.speculative_eagle_topk
    names = {args.speculative_draft_attention_backend} - {None} or {*attention_backends_of(args)}
    return topk if topk and topk > 1 and not names <= {"triton", "torch_native"} else None


def _plan_stream(situation: Situation) -> object | None:
    from sglang.srt.environ import envs

    return bool(envs.SGLANG_ENABLE_OVERLAP_PLAN_STREAM.get()) or None


def _decode_graph(situation: Situation) -> object | None:
    """Graphs of a backend that captures no verify pass, or, unless they are asked for by name, of
    one whose verify passes no such GPU has replayed.
    """
    from sglang.srt.arg_groups.overrides import attention_backends_of
    from sglang.srt.runtime_context import get_platform

    args, attention = situation.args, situation.attention
    capture = [record for record in ADAPTERS if attention in record.drafts_in_graphs]
    if args.cuda_graph_backend_decode is None:
        capture = [one for one in capture if one.is_verified_on(get_platform(), attention)]
    served = {one.name for one in capture} >= {*attention_backends_of(args)}
    return None if served else graph(situation, "decode")


DRAFTS: tuple[Row, ...] = (
    Row(
        "n-gram drafts",
        "--speculative-algorithm NGRAM",
        "works",
        "answers are transformers', GQA and MLA, accepted drafts asserted; graphs: see below",
        alone="starts",
    ),
    Row(
        "EAGLE, EAGLE3, MTP (NEXTN) and draft models of their own (STANDALONE)",
        "--speculative-algorithm",
        "works",
        "answers are transformers', GQA and MLA, as many drafts right as without --dcp-size; "
        "graphs: see below",
        alone="starts",
    ),
    Row(
        "DSPARK and what cutedsl_mla verifies, of MLA models, and draft models of DSA and Qwen3.5",
        "--speculative-algorithm",
        "own",
        "EAGLE and MTP of top-k 1 and DSPARK; MLA verified by cutedsl_mla, DSA by trtllm",
        given=_draft_of_sglang,
        alone="serves",
        proof="test_kimi_linear_dcp_dspark4; layers/attention/cutedsl_mla_backend.py, "
        "models/qwen3_5.py",
    ),
    Row(
        "other kinds of drafts",
        "--speculative-algorithm",
        "refused",
        "it has a worker of its own, which has not been tried",
        "Use EAGLE, EAGLE3, NEXTN, STANDALONE or NGRAM, or leave the flag or --dcp-size out",
        _other_draft,
    ),
    Row(
        "drafts whose number adapts",
        "--speculative-adaptive",
        "refused",
        "it builds the target's attention as if it were the draft's, over a whole cache",
        WITHOUT,
        flag("speculative_adaptive"),
    ),
    Row(
        "several draft layers that are models of their own",
        "--enable-multi-layer-eagle",
        "refused",
        "it has a worker of its own, which has not been tried",
        WITHOUT,
        flag("enable_multi_layer_eagle"),
    ),
    Row(
        "drafts accepted by rejection sampling",
        "--speculative-use-rejection-sampling",
        "refused",
        "it has not been tried",
        WITHOUT,
        flag("speculative_use_rejection_sampling"),
    ),
    Row(
        "drafts in pipeline stages",
        "--pp-size",
        "refused",
        "what is right, and what comes next, is known to the last stage alone, which would have to "
        "hand it to the others: not tried",
        "Use --pp-size 1, or leave --speculative-algorithm or --dcp-size out",
        _drafts(more_than_one("pp_size")),
    ),
    Row(
        "hierarchical cache with draft models",
        "--enable-hierarchical-cache",
        "refused",
        "copies of a draft's whole cache would go by the owners of the target's",
        "Leave the flag or --speculative-algorithm out",
        _draft_models(flag("enable_hierarchical_cache")),
        alone="refuses",
    ),
    Row(
        "trees of drafts read by other backends than triton",
        "--speculative-eagle-topk",
        "refused",
        "the draft's attention would look for branches in pages of --page-size, and they lie in "
        "pages of the whole group",
        "Use 1, or --speculative-draft-attention-backend triton",
        _draft_models(_tree),
    ),
    Row(
        "preparation of verify passes on a stream of its own",
        "SGLANG_ENABLE_OVERLAP_PLAN_STREAM",
        "refused",
        "it has not been tried",
        "Unset the variable",
        _draft_models(_plan_stream),
    ),
    Row(
        "drafts in prefill-decode disaggregation",
        "--disaggregation-mode",
        "refused",
        "a draft's cache, and n-grams of a prompt that another server read, have not been tried",
        "Leave the flag or --speculative-algorithm out",
        _drafts(disaggregated),
    ),
    Row(
        "drafts verified in CUDA graphs of backends that no GPU was seen with, unless named",
        "--cuda-graph-backend-decode",
        "refused",
        "no GPU of this generation has replayed a verify pass of the attention backend yet, or it "
        "captures none",
        "Use --cuda-graph-backend-decode disabled with --speculative-algorithm, or full where "
        "docs/speculative.md says that the backend captures them",
        _drafts(_decode_graph),
    ),
)
