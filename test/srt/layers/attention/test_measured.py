"""The line at start-up where another backend was measured to be faster; constructed figures."""

import logging
from types import SimpleNamespace
from typing import Any

import pytest
from sglang_helix.check import told_about
from sglang_helix.srt.layers.attention import measured
from sglang_helix.srt.layers.attention.adapters import ADAPTERS
from sglang_helix.srt.layers.attention.measured import Faster, Figures, faster
from sglang_helix.srt.server_args import _advise_faster

pytestmark = pytest.mark.quick


def of(**us: list[float]) -> dict[str, Figures]:
    """Figures of MLA with 128 heads on Hopper, of two sizes."""
    sizes = ("1 x 4096", "8 x 4096")
    by_name = {name: dict(zip(sizes, times, strict=False)) for name, times in us.items()}
    return {"MLA 128": Figures(device="a GPU", major=9, us=by_name)}


@pytest.mark.parametrize(
    ("flashmla", "advised"),
    [
        ([100.0, 100.0], None),
        ([91.0, 91.0], None),  # 1.099 times as fast
        ([90.9, 90.9], 110 / 100),
        ([100.0, 80.0], 125 / 100),  # 1.12 over both sizes
        ([110.0, 80.0], None),
        ([80.0], 125 / 100),  # the size that both have
        ([], None),
    ],
)
def test_only_by_more_than_a_tenth(flashmla: list[float], advised: float | None) -> None:
    figures = of(fa3=[100.0, 100.0], flashmla=flashmla, flashinfer=[95.0, 95.0])
    found = faster("fa3", ["fa3", "flashinfer", "flashmla"], "MLA 128", 9, figures)
    assert (found is None) == (advised is None)
    if found is not None and advised is not None:
        assert (found.backend, found.device) == ("flashmla", "a GPU")
        assert found.most == pytest.approx(advised, abs=2e-3)


def test_the_fastest_of_those_that_serve_here() -> None:
    figures = of(fa3=[100.0, 100.0], flashmla=[80.0, 50.0], flashinfer=[70.0, 85.0])
    asked = ("fa3", ["flashinfer", "flashmla"], "MLA 128")
    assert faster(*asked, 9, figures) == Faster("flashmla", 1.25, 2.0, "a GPU")
    assert faster("fa3", ["flashinfer"], "MLA 128", 9, figures) is not None
    assert faster("flashmla", ["flashinfer"], "MLA 128", 9, figures) is None
    # Of another generation, of other heads, of a backend without figures: nothing is known.
    assert faster(*asked, 10, figures) is None
    assert faster("fa3", ["flashmla"], "MLA 64", 9, figures) is None
    assert faster("triton", ["flashmla"], "MLA 128", 9, figures) is None


def situation(**changed: Any) -> Any:
    """DeepSeek-V3's attention on 8 ranks of one group."""
    facts = {"tp_size": 8, "dcp_size": 8, "kv_cache_dtype": "auto", "latent": 512, "heads": 128}
    facts |= changed
    model = SimpleNamespace(
        kv_lora_rank=facts["latent"],
        qk_rope_head_dim=64,
        get_max_num_attention_heads=lambda: facts["heads"],
        hf_text_config=None,
    )
    return SimpleNamespace(
        args=SimpleNamespace(**facts),
        attention_ranks=facts["tp_size"],
        model=model,
        mla=True,
        attention="MLA",
    )


@pytest.mark.parametrize(
    ("machine", "changed", "backend", "advised"),
    [
        ("Hopper", {}, "fa3", True),
        ("Hopper", {"tp_size": 16, "dcp_size": 8, "heads": 256}, "fa3", True),
        ("Hopper", {"dcp_size": 4}, "fa3", False),  # 64 heads of two shards
        ("Hopper", {"kv_cache_dtype": "fp8_e4m3"}, "fa3", False),
        ("Hopper", {"latent": 256}, "fa3", False),
        ("Hopper", {}, "flashmla", False),
        ("Blackwell", {}, "flashinfer", False),
    ],
)
def test_one_line_for_the_heads_of_the_layout(
    machine: str,
    changed: dict[str, Any],
    backend: str,
    advised: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    figures = of(fa3=[100.0, 100.0], flashinfer=[99.0, 99.0], flashmla=[80.0, 85.0])
    monkeypatch.setattr(measured, "shipped", lambda: figures)
    with caplog.at_level(logging.INFO, "sglang_helix"), told_about(machine):
        _advise_faster(situation(**changed), backend)
    said = [
        "--attention-backend flashmla decoded 1.18 to 1.25 times as fast as fa3 with the MLA 128 "
        "heads of this layout (a GPU, docs/benchmarks.md)."
    ]
    assert caplog.messages == (said if advised else [])


def test_what_is_shipped_can_be_read() -> None:
    for heads, found in measured.shipped().items():
        assert set(found["us"]) <= {record.name for record in ADAPTERS}, heads
        assert all(time > 0 for times in found["us"].values() for time in times.values())
