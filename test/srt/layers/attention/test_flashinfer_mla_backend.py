"""LSEs of chunks of a prefix; that answers are right by them: `test_adapters.py`, on stand-ins."""

import pytest
import torch
from sglang_helix.srt.layers.attention.flashinfer_mla_backend import natural_lse

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
