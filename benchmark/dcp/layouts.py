"""Layouts of `benchmark.dcp serve` by name, and what one line of its figures says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from sglang_helix.srt.layers.dcp.exchange import BACKENDS

MARK = "function only"
# How a sharded layer has its queries, where `cost.gathers` does not say by what they are gathered.
REPLICATED, GATHERED = "replicated", "gathered"
MEASURED, DOES_NOT_FIT = "measured", "does not fit"
DID_NOT_START, FAILED = "did not start", "failed"
TOO_LONG, TOO_MANY = "beyond --context-length", "beyond --max-running-requests"
PREFIXES = ("shared", "own", "cold", "made")
COMMS = tuple(BACKENDS)


@dataclass(frozen=True)
class Row:
    """One layout at one size; no times where status is not "measured"."""

    layout: str
    tp_size: int
    dcp_size: int | None
    comm: str
    queries: str
    """How a sharded layer has all heads of its group; plain TP: empty."""
    prefill_decode_interval: int
    prefix: str
    context: int
    concurrency: int
    status: str
    tpot_p10_ms: float | None
    tpot_median_ms: float | None
    tpot_p90_ms: float | None
    longest_gap_ms: float | None
    """Between two tokens of one request: where prefill starves decode, it shows here first."""
    ttft_median_ms: float | None
    tokens_per_s: float | None
    """Output tokens of all requests, from the first request to the last token."""
    output_tokens: int | None
    cached_tokens: int | None
    """Of a prompt, found in the prefix cache; the fewest of all requests."""
    kv_tokens: int | None
    """Capacity of the cache, over all ranks that split a sequence."""
    kv_bytes: int | None
    """Size of the cache on each rank; only servers with the series say."""
    needed_tokens: int | None
    """Of capacity, for all requests with contexts of their own."""
    mark: str
    model: str
    device: str


class Layout(NamedTuple):
    name: str
    flags: tuple[str, ...]


def parse_layout(text: str, tp_size: int) -> Layout:
    """Flags of a layout by name; raises ValueError with what is allowed."""
    layout, named, backend = text.partition("@")
    attention = ("--attention-backend", backend) if named else ()
    name, *rest = layout.split(":")
    size, comm = [*rest, "", ""][:2]
    if size and not size.isdecimal():
        raise ValueError(f"--layouts {text}: {size!r} is not a number of ranks")
    if layout == "tp":
        return Layout(text, attention)
    if name in COMMS and len(rest) < 2:
        sharded = ("--dcp-size", size or str(tp_size), "--dcp-comm-backend", name)
        return Layout(text, sharded + attention)
    if name == "attn-tp" and size and len(rest) < 3 and comm in ("", *COMMS):
        sharded = ("--attn-tp-size", size, "--dcp-comm-backend", comm or "a2a")
        return Layout(text, sharded + attention)
    raise ValueError(
        f"--layouts {text}: use tp, ag_rs[:K], a2a[:K], symm[:K] or attn-tp:A[:COMM], with "
        "@BACKEND behind it for an attention backend"
    )
