"""What `benchmark.dcp collectives` writes: marked rows, a table, a plot."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from benchmark.dcp import report

MARK = "function only"


@dataclass(frozen=True)
class Row:
    """One candidate at one size."""

    shape: str
    heads: int
    head_dim: int
    ranks: int
    batch: int
    name: str
    mode: str
    """graph or eager: how a sample was run."""
    p10_us: float
    median_us: float
    p90_us: float
    link_bytes: int
    """That a rank must send to the others: the other ranks' heads and their LSEs."""
    error: float
    """Relative to float64, of the worst rank: the norm of the difference over the norm."""
    mark: str
    device: str
    software: str


def shares_gpus(device: str, ranks: int) -> bool:
    return device == "cuda" and ranks > torch.cuda.device_count()


def mark(device: str, ranks: int) -> str:
    return MARK if reason_of_mark(device, ranks) else ""


HEAD = (
    f"{'shape':<6}{'N':>3}{'B':>6}  {'candidate':<20}{'mode':<6}{'p10 us':>10}{'median':>10}"
    f"{'p90 us':>10}{'link bytes':>12}{'error':>10}"
)


def table_line(row: Row) -> str:
    return (
        f"{row.shape:<6}{row.ranks:>3}{row.batch:>6}  {row.name:<20}{row.mode:<6}"
        f"{row.p10_us:>10.1f}{row.median_us:>10.1f}{row.p90_us:>10.1f}{row.link_bytes:>12}"
        f"{row.error:>10.1e}  {row.mark}".rstrip()
    )


def plot(rows: list[Row], path: Path) -> str:
    """Latency against batch, a panel for each shape and group size; returns what was done."""
    plots = report.pyplot()
    if plots is None:
        return report.no_plot("collectives", path)
    panels = list(dict.fromkeys((row.shape, row.ranks) for row in rows))
    names = list(dict.fromkeys(row.name for row in rows))
    colours = plots.get_cmap("tab10")
    figure, axes = plots.subplots(
        len(panels), 1, figsize=(7, 3.6 * len(panels)), squeeze=False, layout="constrained"
    )
    for (shape, ranks), axis in zip(panels, axes[:, 0], strict=True):
        panel = [row for row in rows if (row.shape, row.ranks) == (shape, ranks)]
        for name in dict.fromkeys(row.name for row in panel):
            line = sorted((row for row in panel if row.name == name), key=lambda row: row.batch)
            batches, colour = [row.batch for row in line], colours(names.index(name))
            style = "-" if name.startswith(report.OURS) else "--"
            medians = [row.median_us for row in line]
            axis.plot(batches, medians, style, color=colour, marker="o", markersize=4, label=name)
            low, high = [row.p10_us for row in line], [row.p90_us for row in line]
            axis.fill_between(batches, low, high, color=colour, alpha=0.15)
        batches = sorted({row.batch for row in panel})
        title = ", ".join(filter(None, (shape, f"N = {ranks}", panel[0].mark)))
        axis.set(xscale="log", yscale="log", xlabel="batch", ylabel="µs per call", title=title)
        axis.set_xticks(batches, [str(batch) for batch in batches])
        axis.xaxis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    about = f"{rows[0].device}, {rows[0].software}"
    figure.suptitle(f"{about}\nsolid: ours, dashed: others'", fontsize=10)
    return report.save(figure, path)


def reason_of_mark(device: str, ranks: int) -> str | None:
    if device == "cpu":
        return "ranks exchange over gloo on a CPU, so these times say nothing of GPUs"
    if shares_gpus(device, ranks):
        return f"{ranks} ranks share {torch.cuda.device_count()} GPU(s) and wait for each other"
    return None
