"""The demo's picture: which rank holds which tokens of a request, and what its memory holds."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont
from sglang_helix.srt.distributed.topology import Layout

TOKENS = 24
_COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#9467bd", "#8c564b", "#e377c2", "#17becf", "#bcbd22")
_NOTHING, _INK, _PALE = "#eeeeee", "#222222", "#777777"
_CELL, _ROW, _HEAD, _MARGIN, _LEFT, _BARS = 20, 18, 62, 24, 100, 330


class Panel(NamedTuple):
    """One layout of a model.

    nodes: that share its ranks. heads: its key-value heads; 1 for MLA's latent. tokens_per_mib:
    tokens of the pool for a MiB of each rank's memory.
    """

    model: str
    layout: str
    tp: int
    dcp: int
    nodes: int
    heads: int
    tokens_per_mib: float


def holds(panel: Panel, rank: int, token: int) -> list[int]:
    """Key-value heads of which a rank stores the key and the value of a token."""
    layout = Layout(panel.tp, panel.dcp)
    if token % panel.dcp != layout.kvp_rank(rank):
        return []
    first = layout.attn_shard(rank) * panel.heads // layout.attn_tp_size
    return list(range(first, first + layout.kv_heads(panel.heads)))


def draw(panels: Sequence[Panel], path: Path) -> None:
    """Write the picture of these layouts, one below the other, as a PNG."""
    heights = [_HEAD + panel.tp * _ROW for panel in panels]
    width = 2 * _MARGIN + _LEFT + TOKENS * _CELL + _BARS
    picture = Image.new("RGB", (width, sum(heights) + 3 * _MARGIN), "white")
    pen = ImageDraw.Draw(picture)
    write = _Writer(pen)
    write((_MARGIN, _MARGIN), f"Who holds which of a request's first {TOKENS} tokens", 18)
    bars = _MARGIN + _LEFT + TOKENS * _CELL + _MARGIN
    write((bars, _MARGIN), "Tokens in a MiB of each rank", 18)
    most = max(panel.tokens_per_mib for panel in panels)
    top = 2 * _MARGIN
    for panel, height in zip(panels, heights, strict=True):
        _panel(pen, write, panel, top)
        middle = top + _HEAD - 8 + panel.tp * _ROW // 2
        long = round((_BARS - 3 * _MARGIN - 60) * panel.tokens_per_mib / most)
        colour = _COLOURS[2] if panel.dcp > 1 else _PALE
        pen.rectangle((bars, middle - 9, bars + max(long, 1), middle + 9), fill=colour)
        write((bars + long + 8, middle - 8), f"{panel.tokens_per_mib:.0f}", 14)
        top += height
    picture.save(path)


def _panel(pen: ImageDraw.ImageDraw, write: "_Writer", panel: Panel, top: int) -> None:
    what = "the latent" if panel.heads == 1 else f"a colour for each of {panel.heads} KV heads"
    write((_MARGIN, top + 12), f"{panel.model}: {panel.layout}", 15)
    write((_MARGIN, top + 32), what, 12, _PALE)
    for rank in range(panel.tp):
        above = top + _HEAD - 8 + rank * _ROW
        node = f", node {rank * panel.nodes // panel.tp}" if panel.nodes > 1 else ""
        write((_MARGIN, above + 1), f"rank {rank}{node}", 12)
        for token in range(TOKENS):
            left = _MARGIN + _LEFT + token * _CELL
            right, below = left + _CELL - 3, above + _ROW - 4
            pen.rectangle((left, above, right, below), fill=_NOTHING)
            heads = holds(panel, rank, token)
            for place, head in enumerate(heads):
                band = (_ROW - 4) / len(heads)
                edges = (above + round(place * band), above + round((place + 1) * band))
                colour = _COLOURS[head % len(_COLOURS)]
                pen.rectangle((left, edges[0], right, edges[1]), fill=colour)


class _Writer:
    def __init__(self, pen: ImageDraw.ImageDraw) -> None:
        self._pen = pen

    def __call__(self, at: tuple[float, float], text: str, size: int, ink: str = _INK) -> None:
        self._pen.text(at, text, fill=ink, font=ImageFont.load_default(size))
