"""Tables of docs/benchmarks.md and of README, from the files in docs/figures."""

import csv
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import NamedTuple

from sglang_helix.advice import length

FIGURES = Path(__file__).parent / "figures"
Line = dict[str, str]


class Run(NamedTuple):
    """A file of `benchmark.dcp serve`, and the layout of it that is shown beside plain TP."""

    where: str
    what: str
    file: str
    layout: str
    plain: str = "tp@fa3"


RUNS = {
    "lite": Run(
        "4 H200s, 2026-11-28",
        "DeepSeek-V2-Lite, `--dcp-size 4`",
        "serve-h200x4-deepseek-v2-lite",
        "symm@fa3",
    ),
    "half": Run(
        "4 H200s, 2026-11-28",
        "half of Qwen3-235B, `--attn-tp-size 2`",
        "serve-h200x4-qwen3-half",
        "attn-tp:2:symm@fa3",
    ),
    "lite of 2": Run(
        "2 H200s, 2026-11-30",
        "DeepSeek-V2-Lite, `--dcp-size 2`",
        "serve-h200x2-deepseek-v2-lite",
        "symm@fa3",
    ),
    "lite of 2, replicated": Run(
        "2 H200s, 2026-11-30",
        "the same, `--attn-tp-size 1`",
        "serve-h200x2-deepseek-v2-lite",
        "attn-tp:1:symm@fa3",
    ),
    "v3": Run(
        "2 H200s, 2026-11-30",
        "8 layers of DeepSeek-V3, `--dcp-size 2`",
        "serve-h200x2-deepseek-v3-8-layers",
        "symm@fa3",
    ),
    "v3 mtp": Run(
        "2 H200s, 2026-11-30",
        "the same with an MTP draft: a verify pass of 4 tokens, and the 3 steps of its draft",
        "drafts-h200x2-deepseek-v3-8-layers",
        "symm@fa3",
    ),
    "shard": Run(
        "2 H200s, 2026-11-30",
        "one attention shard of Qwen3-235B, `--dcp-size 2`",
        "serve-h200x2-qwen3-shard",
        "symm@fa3",
    ),
    "shard, replicated": Run(
        "2 H200s, 2026-11-30",
        "the same, `--attn-tp-size 1`",
        "serve-h200x2-qwen3-shard",
        "attn-tp:1:symm@fa3",
    ),
    "next": Run(
        "2 H200s, 2026-11-30",
        "a shard of Qwen3-Next, a hybrid, `--dcp-size 2`",
        "serve-h200x2-qwen3-next-shard",
        "symm@fa3",
    ),
    "llama": Run(
        "2 H200s, 2026-11-30",
        "Llama-3-8B, `--dcp-size 2`: no copies to save",
        "serve-h200x2-llama-8b",
        "symm@fa3",
    ),
    "host": Run(
        "2 H200s, 2026-11-30",
        "2 layers of Llama-3-8B, `--dcp-size 2`: what the host takes for a step",
        "host-h200x2",
        "symm@fa3",
    ),
    "h100": Run(
        "4 H100s, 2026-11-28, FlashInfer",
        "DeepSeek-V2-Lite, `--dcp-size 4`",
        "serve-h100x4",
        "symm",
        "tp",
    ),
}
BATCHES = ("1", "8", "64", "256", "1024")
COLUMNS = ((4096, 8192), (32768, 65536), (131072,), (262144,), (524288,), (1048576,))
# Rows of README's table: a run, a context, and requests at once.
SHOWN = (
    ("lite", 1048576, 1),
    ("lite", 262144, 8),
    ("lite", 524288, 8),
    ("lite", 8192, 1),
    ("shard", 131072, 8),
    ("shard", 4096, 1),
    ("next", 131072, 8),
    ("llama", 131072, 8),
)


@cache
def lines_of(file: str) -> list[Line]:
    """A file's rows."""
    with (FIGURES / f"{file}.csv").open() as opened:
        return list(csv.DictReader(opened))


def said(number: float) -> str:
    """Three digits."""
    return (
        f"{number:.0f}" if number >= 100 else f"{number:.1f}" if number >= 10 else f"{number:.2f}"
    )


def markdown(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table."""
    head = list(head)
    lines = [f"| {' | '.join(line)} |" for line in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


def times(run: Run, context: int, requests: int) -> tuple[float | None, float | None] | None:
    """Milliseconds a token, plain TP's and sharded; None of what does not fit. None: not run."""
    found = {
        line["layout"]: line
        for line in lines_of(run.file)
        if (int(line["context"]), int(line["concurrency"])) == (context, requests)
    }
    if not {run.plain, run.layout} <= set(found):
        return None
    plain, sharded = (
        float(line["tpot_median_ms"]) if line["status"] == "measured" else None
        for line in (found[run.plain], found[run.layout])
    )
    return plain, sharded


def tokens(run: Run, layout: str) -> int:
    """What the cache of a layout holds."""
    return next(int(line["kv_tokens"]) for line in lines_of(run.file) if line["layout"] == layout)


def servers() -> str:
    """Milliseconds a token of whole servers, plain TP's and sharded, and how many times faster."""
    rows = []
    for run in RUNS.values():
        gain = tokens(run, run.layout) / tokens(run, run.plain)
        for requests in (1, 8):
            row = [run.where, run.what, f"{gain:.1f}x", str(requests)]
            for contexts in COLUMNS:
                both = [found for one in contexts if (found := times(run, one, requests))]
                row.append(_beside(*both[0]) if both else "")
            rows.append(row)
    head = ["hardware, date", "model's shape, layout", "KV tokens", "requests"]
    return markdown(head + [" or ".join(map(length, one)) for one in COLUMNS], rows)


def _beside(plain: float | None, sharded: float | None) -> str:
    if sharded is None:
        return "do not fit"
    if plain is None:
        return f"- / {said(sharded)}"
    ratio = f"{plain / sharded:.2f}"
    return f"{said(plain)} / {said(sharded)}: " + (f"**{ratio}**" if ratio > "1.00" else ratio)


def readme() -> str:
    """README's table of servers."""
    rows = []
    for name, context, requests in SHOWN:
        run = RUNS[name]
        found = times(run, context, requests)
        assert found is not None
        plain, sharded = ("does not fit" if one is None else f"{one:.1f}" for one in found)
        load = f"{requests} x {length(context)}"
        rows.append([run.where, run.what, load, plain, sharded])
    head = ["hardware, date", "model's shape", "load", "plain TP, FA3", "sharded, `symm`"]
    return markdown(head, rows)


def collectives(ranks: int) -> list[Line]:
    """The exchange's lines; `symm` between 2 as a server takes it: one row ahead, last of two."""
    lines = lines_of(f"collectives-h200x{ranks}")
    if ranks != 2:
        return lines
    ahead = [
        {**line, "name": "helix symm"}
        for line in lines_of("variants-h200x2")
        if line["name"] == "helix symm, one row ahead"
    ]
    return lines + ahead


def peers() -> str:
    """Microseconds of `symm` and of what others have for the same, between 2 GPUs."""
    names = {"helix symm": "`symm`", "flashinfer kernel": "FlashInfer's kernel"}
    names |= {"flashinfer": "the same, with its pack", "torch all_to_all_nd": "torch"}
    us = by_name(collectives(2))
    rows = [
        [batch, *(said(us[kind, batch, name]) for kind in ("mla", "gqa") for name in names)]
        for batch in BATCHES
    ]
    heads = [f"{kind} {name}" for kind in ("MLA", "GQA") for name in names.values()]
    return markdown(["batch", *heads], rows)


def gather() -> str:
    """Microseconds of a layer's queries between 2 GPUs, by the all-gather and by the kernel."""
    us = by_name(lines_of("gather-h200x2"))
    rows = []
    for batch in BATCHES:
        row = [batch]
        for kind in ("mla", "gqa"):
            plain = us[kind, batch, "helix all-gather"]
            kernel = us.get((kind, batch, "helix symm gather"))
            row.append(f"{said(plain)} / -" if kernel is None else _beside(plain, kernel))
        rows.append(row)
    return markdown(["batch", "MLA, 128 heads", "GQA, 64 heads"], rows)


def values() -> str:
    """Microseconds of MLA's value projection and exchange between 2 GPUs, in both orders."""
    us = by_name(lines_of("values-h200x2"))
    rows = []
    for batch in dict.fromkeys(batch for _, batch, _ in us):
        row = [batch]
        for name in ("helix symm", "helix a2a"):
            behind, before = (
                us["mla", batch, f"{name}, projected {order}"] for order in ("behind", "before")
            )
            row.append(_beside(behind, before))
        rows.append(row)
    return markdown(["batch", "`symm`", "`a2a`"], rows)


def by_name(lines: Iterable[Line]) -> dict[tuple[str, str, str], float]:
    """Medians, by shape, batch and name."""
    return {
        (line["shape"], line["batch"], line["name"]): float(line["median_us"]) for line in lines
    }


def exchange() -> str:
    """Microseconds of the exchange of a layer."""
    names = {"helix symm": "`symm`", "helix a2a": "`a2a`", "helix ag_rs": "`ag_rs`"}
    names |= {"sglang a2a": "SGLang's `a2a`", "sglang ag_rs": "its `ag_rs`"}
    rows = []
    for ranks in (2, 4):
        lines = collectives(ranks)
        for batch in ("1", "64", "1024"):
            cells = {
                (line["shape"], line["name"]): said(float(line["median_us"]))
                for line in lines
                if line["batch"] == batch
            }
            us = [cells[kind, name] for kind in ("mla", "gqa") for name in names]
            rows.append([str(ranks), batch, *us])
    head = [
        "H200s",
        "batch",
        *(f"{kind} {name}" for kind in ("MLA", "GQA") for name in names.values()),
    ]
    return markdown(head, rows)


def attention() -> str:
    """Microseconds of attention over a shard, beside plain TP's call; the range of the ratio."""
    rows = []
    for kind, shown, backends in (
        ("gqa", "64/8", ("fa3", "fa4", "flashinfer", "triton")),
        ("mla", "MLA 128", ("fa3", "flashmla", "flashinfer", "triton")),
    ):
        took = {
            (line["heads"], line["batch"], line["tokens"], line["name"]): float(line["median_us"])
            for line in lines_of(f"attention-h200-{kind}")
        }
        for backend in backends:
            ratios = [
                us / took[*size, f"{backend} tp"]
                for (*size, name), us in took.items()
                if name == backend and (*size, f"{backend} tp") in took
            ]
            cells = [
                f"{said(took[shown, batch, local, backend])} / "
                f"{said(took[shown, batch, local, f'{backend} tp'])}"
                for batch, local in (("1", "4096"), ("1", "131072"), ("8", "131072"))
            ]
            span = f"{min(ratios):.2f} to {max(ratios):.2f} ({len(ratios)} sizes)"
            heads = "GQA 64/8" if kind == "gqa" else "MLA, 128"
            rows.append([f"`{backend}`", heads, *cells, span])
    head = ["backend", "heads", "1 x 4K", "1 x 128K", "8 x 128K", "adapter / plain TP, all sizes"]
    return markdown(head, rows)


def kernels() -> str:
    """Microseconds of kernels on one GPU, ours and SGLang's, of 8 ranks."""
    took = {
        (line["op"], line["shape"], line["batch"], line["name"]): float(line["median_us"])
        for line in lines_of("kernels-h200")
        if line["ranks"] == "8"
    }
    shown = [(op, op, "helix", "sglang") for op in ("combine", "merge", "pack")]
    shown += [
        ("layer", f"layer, `{one}`", f"helix {one}", f"sglang {one}") for one in ("a2a", "ag_rs")
    ]
    rows = []
    for op, what, ours, theirs in shown:
        row = [what]
        for kind in ("mla", "gqa"):
            for batch in ("1", "64", "4096"):
                beside = [took[op, kind, batch, name] for name in (ours, theirs)]
                row.append(" / ".join(map(said, beside)))
        rows.append(row)
    sizes = [f"{kind}, batch {batch}" for kind in ("MLA", "GQA") for batch in (1, 64, 4096)]
    return markdown(["", *sizes], rows)


TABLES = {
    "servers": servers,
    "exchange": exchange,
    "peers": peers,
    "gather": gather,
    "values": values,
    "attention": attention,
    "kernels": kernels,
}
