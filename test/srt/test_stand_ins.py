"""The kernels' stand-ins: what they compute, and that a call the real kernel refuses is refused.

They are installed in processes of their own: a GPU's kernels stay what they are in this one.
"""

import math
from typing import Any

import pytest
import torch
from srt.fresh import Fresh

pytestmark = pytest.mark.quick


def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> Any:
    """One head of one query [D] over keys [S, D]: out in float64, and its natural-log LSE."""
    logits = k.double() @ q.double() * scale
    return torch.softmax(logits, 0) @ v.double(), torch.logsumexp(logits, 0)


def fa3_over_pages(**changed: Any) -> tuple[torch.Tensor, ...]:
    """FA3 of three requests of 20, 0 and 5 tokens: out, LSE, q, and each one's keys and values."""
    from sglang_cpu_reference import stand_ins

    stand_ins.install(["fa3"])
    from sglang.kernels.ops.attention.flash_attention import flash_attn_with_kvcache

    torch.manual_seed(0)
    q, keys, values = torch.randn(3, 4, 64), torch.randn(9, 16, 2, 64), torch.randn(9, 16, 2, 64)
    keys[0] = values[0] = torch.nan
    arguments = {
        "page_table": torch.tensor([[8, 2], [-7, -7], [3, 99]], dtype=torch.int32),
        "cache_seqlens": torch.tensor([20, 0, 5], dtype=torch.int32),
        "cu_seqlens_q": torch.arange(4, dtype=torch.int32),
        "max_seqlen_q": 1,
        "softmax_scale": 0.3,
        "causal": True,
        "return_softmax_lse": True,
    }
    for name, value in changed.items():
        arguments[name] = value
    out, lse, *_ = flash_attn_with_kvcache(q, keys, values, **arguments)
    return out, lse, q, keys[[8, 2]].flatten(0, 1)[:20], values[[8, 2]].flatten(0, 1)[:20]


def test_fa3_over_pages(fresh: Fresh) -> None:
    out, lse, q, k, v = fresh.value(fa3_over_pages)
    for head in range(4):
        wanted, wanted_lse = exact(q[0, head], k[:, head // 2], v[:, head // 2], 0.3)
        torch.testing.assert_close(out[0, head].double(), wanted, atol=1e-6, rtol=1e-5)
        assert math.isclose(lse[head, 0], wanted_lse, rel_tol=1e-5)
    assert (out[1] == 0).all()
    assert lse[:, 1].isneginf().all()
    assert out.isfinite().all()


def test_fa3_refuses_what_the_kernel_refuses(fresh: Fresh) -> None:
    table = torch.tensor([[8, 2], [0, 0], [9, 0]], dtype=torch.int32)
    wrong = {
        "pages": ({"page_table": table}, "pages [9] of a cache of 9 pages"),
        "dtype": ({"page_table": table.long()}, "page_table must be int32"),
        "width": ({"page_table": table[:, :1]}, "table of 1 columns"),
        "batch": ({"cache_seqlens": table[:2, 0].contiguous()}, "not for 3 requests"),
        "scale": ({"k_descale": torch.ones(3, 2)}, "k_descale for queries"),
    }
    for changed, message in wrong.values():
        outcome = fresh.outcome(_fa3_with, changed)
        assert outcome.status == 1
        assert message in outcome.output


def _fa3_with(changed: dict[str, Any]) -> None:
    fa3_over_pages(**changed)


def test_a_backend_without_stand_ins_is_named(fresh: Fresh) -> None:
    outcome = fresh.outcome(install_by_variable, SGLANG_CPU_REFERENCE_STAND_INS="fa3,aiter")
    assert "no stand-ins for 'aiter'" in outcome.output


def install_by_variable() -> None:
    from sglang_cpu_reference import stand_ins

    stand_ins.install()


@pytest.mark.parametrize("name", ["fwd", "get_scheduler_metadata"])
def test_operators_have_the_compiled_ones_signature(fresh: Fresh, name: str) -> None:
    assert "int num_splits" in fresh.value(schema_of, name)


def schema_of(name: str) -> str:
    from sglang_cpu_reference import stand_ins

    stand_ins.install(["fa3"])
    return str(getattr(torch.ops.sgl_kernel, name).default._schema)
