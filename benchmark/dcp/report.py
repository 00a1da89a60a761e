"""Tables, CSV and plots of measured calls."""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

COPY = "copy"
OURS = "helix"  # names of our candidates begin so


@dataclass(frozen=True)
class Measured:
    """One candidate, beside a copy of as many bytes; the last columns of a row."""

    name: str
    launches: int | None
    p10_us: float
    median_us: float
    p90_us: float
    moved_bytes: int
    """Bytes that the operation must read and write; the copy beside it moves as many."""
    copy_share: float
    """Time of that copy over this candidate's: 1 is the speed of memory."""
    error: float | None
    """Relative to float64: the norm of the difference over the norm."""
    rotated_mib: float
    """Size of all sets of buffers that a sample went through."""
    device: str
    software: str


@dataclass(frozen=True)
class Size:
    """What a kernel was measured at."""

    op: str
    shape: str
    heads: int
    head_dim: int
    ranks: int
    batch: int


@dataclass(frozen=True)
class Row(Measured, Size):
    """One candidate at one size."""

    @property
    def ours(self) -> bool:
        return self.name.startswith(OURS)


def add_files(parser: argparse.ArgumentParser) -> None:
    """A command's flags for the files that it writes and reads."""
    parser.add_argument("--csv", type=Path, help="write the figures here")
    parser.add_argument("--plot", type=Path, help="write a PNG here; needs matplotlib")
    parser.add_argument(
        "--from-csv", nargs="+", type=Path, help="measure nothing, report on these figures together"
    )


def table(rows: Iterable[Row]) -> str:
    head = (
        f"{'op':<9}{'shape':<6}{'N':>3}{'B':>6}  {'candidate':<26}{'launches':>8}"
        f"{'p10 us':>10}{'median':>10}{'p90':>10}{'of copy':>9}{'error':>10}"
    )
    lines = [head, "-" * len(head)]
    for row in rows:
        lines.append(
            f"{row.op:<9}{row.shape:<6}{row.ranks:>3}{row.batch:>6}  {row.name:<26}"
            f"{'-' if row.launches is None else row.launches:>8}"
            f"{row.p10_us:>10.2f}{row.median_us:>10.2f}{row.p90_us:>10.2f}{row.copy_share:>9.0%}"
            f"{'-' if row.error is None else format(row.error, '.1e'):>10}"
        )
    return "\n".join(lines)


def summary(rows: Sequence[Row]) -> str:
    """Per operation: our worst and best ratio to the fastest peer, and our share of the copy."""
    lines = []
    for op in dict.fromkeys(row.op for row in rows):
        sizes: dict[tuple[str, int, int], list[Row]] = {}
        for row in rows:
            if row.op == op and row.name != COPY:
                sizes.setdefault((row.shape, row.ranks, row.batch), []).append(row)
        ratios, shares = [], []
        for size, group in sizes.items():
            ours = min((r for r in group if r.ours), key=lambda r: r.median_us, default=None)
            peer = min((r for r in group if not r.ours), key=lambda r: r.median_us, default=None)
            if ours:
                shares.append((ours.copy_share, size, ours.name))
            if ours and peer:
                ratios.append((peer.median_us / ours.median_us, size, peer.name, ours.name))
        if ratios:
            low, high = min(ratios), max(ratios)
            lines.append(
                f"{op}: fastest peer's time over ours: {low[0]:.2f} at worst {_at(low[1])} "
                f"({low[2]} / {low[3]}), {high[0]:.2f} at best {_at(high[1])}"
            )
        if shares:
            batch = max(size[2] for _, size, _ in shares)
            low_share = min(s for s in shares if s[1][2] == batch)
            lines.append(
                f"{op}: at batch {batch} at least {low_share[0]:.0%} of the copy's bandwidth "
                f"{_at(low_share[1])}"
            )
    return "\n".join(lines)


def _at(size: tuple[str, int, int]) -> str:
    return f"[{size[0]}, N {size[1]}, B {size[2]}]"


def write_csv(rows: Iterable[Any], path: Path, kind: type = Row, *, append: bool = False) -> None:
    """Rows of a dataclass of numbers and strings; an absent figure is an empty cell.

    append: to what an earlier call wrote there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a" if append else "w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(kind)], lineterminator="\n")
        if not append:
            writer.writeheader()
        for row in rows:
            values = asdict(row)
            writer.writerow(
                {k: format(v, ".4g") if isinstance(v, float) else v for k, v in values.items()}
            )


def read_csv(path: Path, kind: type = Row) -> list[Any]:
    parse: dict[str, Any] = {"int": int, "float": float, "str": str}
    rows = []
    with path.open(newline="") as file:
        for record in csv.DictReader(file):
            values: dict[str, Any] = {}
            for f in fields(kind):
                text, name = record[f.name], str(f.type)
                optional = name.endswith(" | None") and text == ""
                values[f.name] = None if optional else parse[name.removesuffix(" | None")](text)
            rows.append(kind(**values))
    return rows


def pyplot() -> Any:
    """matplotlib's, drawing to files; None where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save(figure: Any, path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return f"plot: {path}"


def no_plot(command: str, path: Path) -> str:
    return f"no plot: matplotlib is not installed; later: {command} --from-csv CSV --plot {path}"


def plot(rows: Sequence[Row], path: Path, ranks: int) -> str:
    """Latency against batch, and share of the copy's bandwidth; returns what was done."""
    plots = pyplot()
    if plots is None:
        return no_plot("kernels", path)
    rows = [row for row in rows if row.ranks == ranks]
    panels = list(dict.fromkeys((row.op, row.shape) for row in rows))
    figure, axes = plots.subplots(
        len(panels), 2, figsize=(12, 3.4 * len(panels)), squeeze=False, layout="constrained"
    )
    names = list(dict.fromkeys(row.name for row in rows))
    colours = plots.get_cmap("tab10")
    for (op, shape), (latency, share) in zip(panels, axes, strict=True):
        for name in names:
            line = sorted(
                (r for r in rows if (r.op, r.shape, r.name) == (op, shape, name)),
                key=lambda r: r.batch,
            )
            if not line:
                continue
            style = {
                "label": name,
                "color": colours(names.index(name)),
                "marker": "o",
                "markersize": 4,
                "linestyle": ":" if name == COPY else "-" if line[0].ours else "--",
            }
            batches = [r.batch for r in line]
            latency.plot(batches, [r.median_us for r in line], **style)
            latency.fill_between(
                batches,
                [r.p10_us for r in line],
                [r.p90_us for r in line],
                color=style["color"],
                alpha=0.15,
            )
            if name != COPY:
                share.plot(batches, [100 * r.copy_share for r in line], **style)
        latency.set(yscale="log", ylabel="µs per call")
        share.set(ylabel="% of the copy's bandwidth")
        share.axhline(100, color="grey", linewidth=0.8)
        for axis in (latency, share):
            axis.set(xscale="log", xlabel="batch", title=f"{op}, {shape}, N = {ranks}")
            axis.set_xticks(batches, [str(b) for b in batches])
            axis.xaxis.minorticks_off()
            axis.grid(alpha=0.3)
        latency.legend(fontsize=7)
    figure.suptitle(f"{rows[0].device}, {rows[0].software}; solid: ours, dashed: peers")
    return save(figure, path)
