"""Which backend decodes faster, by the figures of `python -m benchmark.dcp attention`.

They are in `measured.json` beside this module, which that command writes (`--ship`).

Importing this module imports neither SGLang nor torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import geometric_mean
from typing import NamedTuple, TypedDict

FILE = Path(__file__).with_suffix(".json")
# What a backend must be faster by, over all sizes, to be worth a line.
MARGIN = 1.1


class Figures(TypedDict):
    """Of a rank's heads: the device, its compute capability's major, and microseconds.

    us: by backend and by size, batch x local tokens.
    """

    device: str
    major: int
    us: dict[str, dict[str, float]]


class Faster(NamedTuple):
    """A backend that takes 1 / least to 1 / most of the time of another, by size."""

    backend: str
    least: float
    most: float
    device: str


def heads_name(queries: int, kv: int | None) -> str:
    """What figures go by: H/G query on key-value heads of 128, or MLA's H (kv None)."""
    return f"MLA {queries}" if kv is None else f"{queries}/{kv}"


def shipped() -> dict[str, Figures]:
    """By `heads_name`."""
    figures: dict[str, Figures] = json.loads(FILE.read_text())
    return figures


def faster(
    backend: str,
    others: Iterable[str],
    heads: str,
    major: int,
    figures: Mapping[str, Figures] | None = None,
) -> Faster | None:
    """The fastest of the others for these heads on such a GPU, where it is by more than MARGIN.

    By the geometric mean of the sizes that both were measured at. None where there are no figures.
    """
    found = (shipped() if figures is None else figures).get(heads)
    if found is None or found["major"] != major or backend not in found["us"]:
        return None
    best, best_mean = None, MARGIN
    own = found["us"][backend]
    for other in others:
        theirs = found["us"].get(other, {})
        ratios = [own[size] / theirs[size] for size in own if size in theirs]
        if ratios and (mean := geometric_mean(ratios)) > best_mean:
            best, best_mean = Faster(other, min(ratios), max(ratios), found["device"]), mean
    return best
