"""Rows: sliding windows."""

from __future__ import annotations

from sglang_helix.srt.compatibility.conditions import flag, more_than_one
from sglang_helix.srt.compatibility.row import PLAIN, WITHOUT, Given, Row
from sglang_helix.srt.compatibility.situation import Situation

# Classes of windows with a pool of their own that are served.
_POOLED = {
    "Gemma4ForConditionalGeneration",
    "GptOssForCausalLM",
    "GraniteSWAForCausalLM",
    "LagunaForCausalLM",
    "MellumForCausalLM",
    "MiMoV2FlashForCausalLM",
    "MiMoV2ForCausalLM",
    "Step3p5ForCausalLM",
    "Step3p7ForConditionalGeneration",
}


def untried_windows(situation: Situation) -> object | None:
    """Windows in a pool of their own, of a class that has not been tried."""
    untried = _POOLED.isdisjoint(situation.model.hf_config.architectures)
    return (situation.windows and untried) or None


def _window_uneven(situation: Situation) -> object | None:
    window = situation.cut_windows
    return window if window % situation.args.dcp_size else None


def _window_drafts(situation: Situation) -> object | None:
    drafts = situation.args.speculative_algorithm
    return drafts if situation.windows or situation.cut_windows else None


def _window_heads(situation: Situation) -> object | None:
    args = situation.args
    whole = situation.plain_heads_grouped and not args.dcp_replicate_q_proj
    return (situation.windows and not whole) or None


def _windows(given: Given) -> Given:
    return lambda situation: given(situation) if situation.windows else None


WINDOWS: tuple[Row, ...] = (
    Row(
        "sliding windows in a pool of their own (gpt-oss, Gemma-4, Granite-SWA, Laguna, Mellum, "
        "MiMo-V2, Step-3.5)",
        "",
        "works",
        "window layers stay as plain TP keeps them, full layers are sharded; answers on a CPU are "
        "transformers', both pools conserved exactly",
        alone="wrong",
        proof="the allocator of windows does not widen, mem_cache/kv_cache_configurator.py",
    ),
    Row(
        "sliding windows in the pool of all layers (Afmoe, Command-A and A+, Exaone-4, Gemma-2, "
        "Gemma-3, K-EXAONE)",
        "",
        "works",
        "each rank attends the window's tokens that it holds, exactly as many keys as the "
        "configuration says (upstream's Triton attends one less at decode, some classes one more)",
        alone="wrong",
        proof="every rank would count its own tokens back, layers/attention/triton_backend.py",
    ),
    Row(
        "sliding windows that the ranks of a group do not share evenly",
        "",
        "refused",
        "kernels count a window in tokens of this rank, as many on every rank",
        "Split the sequence over a number of ranks that divides the window, or serve this model "
        "without --dcp-size",
        _window_uneven,
        alone="wrong",
        proof="every rank would count its own tokens back, layers/attention/triton_backend.py",
    ),
    Row(
        "sliding windows in a pool of their own, of other classes",
        "",
        "refused",
        "this class has not been tried",
        PLAIN,
        untried_windows,
        alone="wrong",
        proof="the allocator of windows does not widen, mem_cache/kv_cache_configurator.py",
    ),
    Row(
        "sliding windows with replicated queries, or fewer attention shards than key-value heads",
        "",
        "refused",
        "window layers keep the heads of plain TP, and so do full layers where each rank of a "
        "group has the same key-value head",
        "Split the sequence over at most tp size / key-value heads ranks, with gathered queries, "
        "or serve this model without --dcp-size",
        _window_heads,
        alone="wrong",
        proof="sgl-project/sglang#34355",
    ),
    Row(
        "sliding windows beside the hierarchical cache",
        "--enable-hierarchical-cache",
        "refused",
        "host copies of two pools with pages of different lengths have not been tried",
        WITHOUT,
        _windows(flag("enable_hierarchical_cache")),
    ),
    Row(
        "sliding windows beside drafts",
        "--speculative-algorithm",
        "refused",
        "accepted drafts move in one pool by owner and in the other not, and the window of each "
        "draft begins elsewhere in the prefix: neither is built",
        WITHOUT,
        _window_drafts,
    ),
    Row(
        "sliding windows in pipeline stages",
        "--pp-size",
        "refused",
        "it has not been tried",
        "Use --tp-size and --dcp-size alone",
        _windows(more_than_one("pp_size")),
    ),
)
