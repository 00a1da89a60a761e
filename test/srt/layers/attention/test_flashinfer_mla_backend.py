"""Plans, and LSEs of chunks of a prefix; answers are right by them: `test_adapters.py`."""

from types import SimpleNamespace

import pytest
import torch
from sglang.srt.layers.attention import flashinfer_mla_backend as upstream
from sglang_helix.srt.layers.attention import flashinfer_plans
from sglang_helix.srt.layers.attention.flashinfer_mla_backend import (
    natural_lse,
    plan_behind_the_last,
)

pytestmark = pytest.mark.quick


def test_an_lse_becomes_natural_and_an_output_alone_stays() -> None:
    logits, out = torch.randn(3, 2, 5), torch.randn(3, 2, 4)
    base2 = torch.log2(logits.exp().sum(-1))
    base2[1] = -torch.inf  # of a request whose prefix ended in an earlier chunk
    kept, lse = natural_lse((out, base2), "a kernel's", arguments=1)
    assert kept is out
    torch.testing.assert_close(lse[::2], logits.logsumexp(-1)[::2])
    assert lse[1].isneginf().all()
    assert natural_lse(out, "a kernel's") is out


def test_a_captured_decode_plans_behind_the_copy_of_its_last_plan() -> None:
    """What FlashInfer copies from, the next plan would overwrite."""
    done: list[str] = []

    class Wrapper:
        _float_workspace_buffer = _int_workspace_buffer = _pin_memory_int_workspace_buffer = None
        _cached_module = SimpleNamespace(plan=lambda *arguments: done.append("plan"))

    wrapper, lens = Wrapper(), torch.zeros(3, dtype=torch.int32)
    flashinfer_plans._copied[wrapper] = SimpleNamespace(
        synchronize=lambda: done.append("wait"), record=lambda: done.append("record")
    )
    sizes = (16, 512, 64, 1, False, 1.0, torch.bfloat16, torch.bfloat16)
    plan_behind_the_last(upstream.fast_mla_decode_plan, wrapper, lens, lens, lens, lens[1:], *sizes)
    assert done == ["wait", "plan", "record"]
