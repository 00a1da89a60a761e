"""The demo's estimate of the time left, and its picture. What it serves, others test."""

from collections import Counter
from pathlib import Path
from unittest import mock

import pytest
from PIL import Image
from sglang_cpu_reference import progress
from sglang_cpu_reference.demo_picture import Panel, draw, holds

pytestmark = pytest.mark.quick

PLAIN = Panel("llama", "tp 4", 4, 1, 1, 2, 100.0)
SHARDED = Panel("llama", "tp 4, dcp 2", 4, 2, 1, 2, 200.0)
ON_TWO_NODES = Panel("deepseek_v2", "tp 4, dcp 4, 2 nodes", 4, 4, 2, 1, 400.0)


@pytest.mark.parametrize(("panel", "copies"), [(PLAIN, 2), (SHARDED, 1), (ON_TWO_NODES, 1)])
def test_every_token_of_every_head_is_held_as_often(panel: Panel, copies: int) -> None:
    held = Counter(
        (token, head)
        for rank in range(panel.tp)
        for token in range(12)
        for head in holds(panel, rank, token)
    )
    assert held == dict.fromkeys(((t, h) for t in range(12) for h in range(panel.heads)), copies)


def test_picture_has_a_cell_where_a_rank_holds_a_token(tmp_path: Path) -> None:
    draw([PLAIN, SHARDED, ON_TWO_NODES], tmp_path / "demo.png")
    with Image.open(tmp_path / "demo.png") as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 20)}
    assert {(31, 119, 180), (255, 127, 14), (238, 238, 238)} <= colours


def test_time_left_follows_the_pace(capsys: pytest.CaptureFixture[str]) -> None:
    """Steps of 10, 10 and 30 s, the first with 20 s more, on a machine half as fast."""
    with mock.patch.object(progress.time, "monotonic", return_value=0.0) as clock:
        steps = progress.Progress({"one": 10, "two": 10, "three": 30}, begin=20)
        with steps.step("one"):
            assert steps.left() == 70
            clock.return_value = 15.0
            assert steps.left() == 55
            clock.return_value = 60.0
        with steps.step("two"):
            assert steps.left() == 20 + 60
            clock.return_value = 70.0
            steps.say("up")
    assert capsys.readouterr().err == "[2/3, about 1 min 10 s left] two: up\n"
