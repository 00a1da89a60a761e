"""LSEs of MLA's prefill in chunks. Extends `layers/attention/flashinfer_mla_backend.py`.

A long prefix is attended in chunks, which SGLang's model merges by natural LSEs. FlashInfer's
kernels return them to the base of 2, so the merge would weigh every chunk wrongly.
"""

import math
from typing import Any


def natural_lse(result: Any, *args: Any, **kwargs: Any) -> Any:
    """After a prefill kernel: (out, LSE) with a natural LSE, or out alone where none was asked."""
    if not isinstance(result, tuple):
        return result
    out, lse = result
    return out, lse * math.log(2)
