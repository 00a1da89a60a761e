"""Tables and plots of `benchmark.dcp serve`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmark.dcp import report
from benchmark.dcp.layouts import DOES_NOT_FIT, MEASURED, Row

HEAD = (
    f"{'layout':<20}{'interval':>9} {'prefix':<7}{'context':>8}{'requests':>9}{'ms/token':>10}"
    f"{'p10':>9}{'p90':>9}{'longest':>10}{'TTFT ms':>10}{'tokens/s':>10}{'cached':>9}"
    f"{'KV tokens':>11}{'KV size':>12}"
)


def size(tokens: int) -> str:
    """262144 -> 256K"""
    for unit, factor in (("M", 1 << 20), ("K", 1 << 10)):
        if tokens >= factor and tokens % factor == 0:
            return f"{tokens // factor}{unit}"
    return str(tokens)


def table_line(row: Row) -> str:
    where = (
        f"{row.layout:<20}{row.prefill_decode_interval:>9} {row.prefix:<7}{size(row.context):>8}"
        f"{row.concurrency:>9}"
    )
    if row.status == MEASURED:
        what = (
            f"{row.tpot_median_ms:>10.2f}{row.tpot_p10_ms:>9.2f}{row.tpot_p90_ms:>9.2f}"
            f"{row.longest_gap_ms:>10.2f}"
            f"{row.ttft_median_ms:>10.1f}{row.tokens_per_s:>10.1f}{row.cached_tokens:>9}"
        )
    else:
        what = f"  {row.status:<65}"
    tokens = "-" if row.kv_tokens is None else row.kv_tokens
    return f"{where}{what}{tokens:>11}{_bytes(row.kv_bytes):>12}  {row.mark}".rstrip()


def _bytes(count: int | None) -> str:
    if count is None:
        return "-"
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.2f} MiB"


def time_per_token(rows: Sequence[Row]) -> str:
    """Contexts against layouts, a table for each concurrency and interval."""
    lines = []
    for concurrency, interval in dict.fromkeys(
        (row.concurrency, row.prefill_decode_interval) for row in rows
    ):
        lines.append(
            f"\nTime per output token in ms, median (p10 to p90), {concurrency} requests, "
            + (f"--prefill-decode-interval {interval}" if interval else "no prefill interval")
        )
        chosen = {
            (row.context, row.layout): row
            for row in rows
            if (row.concurrency, row.prefill_decode_interval) == (concurrency, interval)
        }
        layouts = list(dict.fromkeys(layout for _, layout in chosen))
        lines.append(f"{'context':<9}" + "".join(f"{layout:>26}" for layout in layouts))
        for context in sorted({context for context, _ in chosen}):
            cells = [chosen.get((context, layout)) for layout in layouts]
            marks = {row.mark for row in cells if row}
            line = f"{size(context):<9}" + "".join(f"{_cell(row):>26}" for row in cells)
            lines.append(f"{line}  {' '.join(sorted(marks))}".rstrip())
    return "\n".join(lines)


def _cell(row: Row | None) -> str:
    if row is None or row.status != MEASURED:
        return "-" if row is None else row.status
    return f"{row.tpot_median_ms:.2f} ({row.tpot_p10_ms:.2f} to {row.tpot_p90_ms:.2f})"


def capacity(rows: Sequence[Row]) -> str:
    """What each layout's cache holds, and how many requests of each length fit in it together."""
    lines = ["\nCapacity of the KV cache"]
    for layout in dict.fromkeys(row.layout for row in rows if row.kv_tokens is not None):
        own = [row for row in rows if row.layout == layout and row.kv_tokens is not None]
        held = {
            row.context: row.kv_tokens // (row.needed_tokens // row.concurrency)  # type: ignore
            for row in own
        }
        requests = ", ".join(f"{count} of {size(length)}" for length, count in held.items())
        size_of_rank = f"{_bytes(own[0].kv_bytes)} on each rank"
        line = f"{layout:<20}{own[0].kv_tokens} tokens, {size_of_rank}; at once: {requests}"
        lines.append(f"{line}  {own[0].mark}".rstrip())
    return "\n".join(lines)


def plot(rows: Sequence[Row], path: Path) -> str:
    """Time per token and throughput against the context; returns what was done."""
    plots = report.pyplot()
    if plots is None:
        return report.no_plot("serve", path)
    panels = list(dict.fromkeys(row.concurrency for row in rows))
    names = list(dict.fromkeys(row.layout for row in rows))
    colours = plots.get_cmap("tab10")
    contexts = sorted({row.context for row in rows})
    figure, axes = plots.subplots(
        len(panels), 2, figsize=(12, 4.2 * len(panels)), squeeze=False, layout="constrained"
    )
    for concurrency, (latency, throughput) in zip(panels, axes, strict=True):
        panel = [row for row in rows if row.concurrency == concurrency]
        for name, interval in dict.fromkeys((r.layout, r.prefill_decode_interval) for r in panel):
            line = [r for r in panel if (r.layout, r.prefill_decode_interval) == (name, interval)]
            absent = [size(r.context) for r in line if r.status == DOES_NOT_FIT]
            label = name + (f", interval {interval}" if interval else "")
            if absent:
                label += f" ({DOES_NOT_FIT}: {', '.join(absent)})"
            line = [r for r in line if r.status == MEASURED]
            style = {
                "label": label,
                "color": colours(names.index(name)),
                "linestyle": "--" if interval else "-",
                "marker": "o",
                "markersize": 4,
            }
            at = [r.context for r in line]
            latency.plot(at, [r.tpot_median_ms for r in line], **style)
            low, high = [r.tpot_p10_ms for r in line], [r.tpot_p90_ms for r in line]
            latency.fill_between(at, low, high, color=style["color"], alpha=0.15)
            throughput.plot(at, [r.tokens_per_s for r in line], **style)
        latency.set(ylabel="ms per output token, p10 to p90")
        throughput.set(ylabel="output tokens per second")
        for axis in (latency, throughput):
            axis.set(
                xscale="log", xlabel="context", title=f"{concurrency} requests", ylim=(0, None)
            )
            axis.set_xlim(contexts[0] / 1.1, contexts[-1] * 1.1)
            axis.set_xticks(contexts, [size(context) for context in contexts])
            axis.xaxis.minorticks_off()
            axis.grid(alpha=0.3)
        latency.legend(fontsize=7)
    about = [rows[0].model, rows[0].device, f"{rows[0].prefix} contexts", rows[0].mark]
    figure.suptitle(", ".join(filter(None, about)))
    return report.save(figure, path)
