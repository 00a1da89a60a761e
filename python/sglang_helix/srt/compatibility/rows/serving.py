"""Rows: what a server answers, and how batches run."""

from __future__ import annotations

from sglang_helix.srt.compatibility.conditions import flag, of_mla
from sglang_helix.srt.compatibility.row import WITHOUT, Row
from sglang_helix.srt.compatibility.situation import Situation


def _short_chunk(situation: Situation) -> object | None:
    size = situation.args.chunked_prefill_size
    page = situation.args.page_size * situation.args.dcp_size
    return size if size is not None and 0 < size < page else None


def _beams(situation: Situation) -> object | None:
    """Of a request: there `args` has the request's `beam_width`; a server's has none."""
    width = getattr(situation.args, "beam_width", None)
    return width if width and width > 1 else None


# Asked for by a request, so it is refused by request: `beam_search/coordinator.py`.
BEAM_SEARCH = Row(
    "beam search",
    "beam_width",
    "refused",
    "beams continue one prompt token by token, in slots of a page that all of them would share",
    "Ask for no beams, or serve without --dcp-size",
    _beams,
)


SERVING: tuple[Row, ...] = (
    Row("chunked prefill", "--chunked-prefill-size", "works", "end-to-end matrix, odd sizes"),
    Row(
        "prefill chunk shorter than a widened page",
        "--chunked-prefill-size",
        "refused",
        "a chunk must hold at least one page of the whole group (page size x dcp size)",
        "Use a larger chunk or a smaller --page-size",
        _short_chunk,
    ),
    Row(
        "prefill chunks of changing size",
        "--enable-dynamic-chunking",
        "refused",
        "it has not been tried, and chunks may get shorter than a page of the whole group",
        WITHOUT,
        flag("enable_dynamic_chunking"),
    ),
    Row("mixed chunk", "--enable-mixed-chunk", "works", "answers equal plain TP, GQA"),
    Row(
        "mixed chunk of MLA models",
        "--enable-mixed-chunk",
        "refused",
        "each layer of a mixed batch gathers the whole context of every running request, 9 GiB for "
        "8 of a million tokens",
        "Leave the flag out: chunks of prompts then run between decode steps",
        of_mla(flag("enable_mixed_chunk")),
    ),
    Row("overlap schedule", "--disable-overlap-schedule off", "works", "servers on a GPU"),
    Row("streaming, OpenAI endpoints", "", "works", "answers equal plain TP, GQA and MLA"),
    Row("structured output", "--grammar-backend", "works", "answers equal plain TP, GQA and MLA"),
    Row("log-probabilities of prompts", "", "works", "equal plain TP, GQA and MLA"),
    Row("sampling penalties, several samples", "", "works", "answers equal plain TP"),
    BEAM_SEARCH,
    Row(
        "multi-item scoring",
        "--enable-mis",
        "refused",
        "items of a prompt do not see one another, but the sharded prefix is seen whole",
        WITHOUT,
        flag("enable_mis"),
    ),
    Row(
        "diffusion language models",
        "--dllm-algorithm",
        "refused",
        "their attention is not causal",
        WITHOUT,
        flag("dllm_algorithm"),
    ),
    Row("abort", "", "works", "end-to-end test, pool free again afterwards"),
    Row("retraction and resumption", "", "works", "end-to-end test with a small pool"),
    Row("graceful shutdown", "", "works", "what runs at SIGTERM is answered; no process is left"),
    Row("health and metrics", "--enable-metrics", "works", "served, GQA and MLA"),
    Row(
        "memory released and resumed",
        "/release_memory_occupation",
        "works",
        "answers equal plain TP afterwards, GQA and MLA; on the CPU, where nothing is unmapped",
    ),
)
