"""``torch_native`` for draft models: SGLang's factory of their attention backends has none.

A draft model decodes several tokens ahead, each step over the cached tokens and the drafts of its
own branch before it.
"""

from typing import Any

import torch
from sglang_helix.srt.layers.attention.torch_reference import TorchReferenceAttnBackend


class Step(TorchReferenceAttnBackend):
    """Decoding of one draft per branch: `slots` has the tokens of each branch, in order."""

    prefill_attention_backend_str = "torch_native"
    decode_attention_backend_str = "torch_native"
    slots: list[torch.Tensor]

    def decoded_slots(self, forward_batch: Any) -> list[torch.Tensor]:
        """See `TorchReferenceAttnBackend.decoded_slots`."""
        return self.slots


class TorchMultiStepDraftBackend:
    """One backend for each step but the last, whose tokens nobody attends."""

    needs_cpu_seq_lens = False

    def __init__(self, runner: Any, topk: int, steps: int) -> None:
        self.topk, self.steps = topk, steps
        self.req_to_token_pool = runner.req_to_token_pool
        self.attn_backends = [Step(runner) for _ in range(steps - 1)]

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Of a whole chain of steps, whose slots stand in order of request, branch and step."""
        table = self.req_to_token_pool.req_to_token
        drafts = forward_batch.out_cache_loc.view(forward_batch.batch_size, self.topk, self.steps)
        requests = forward_batch.req_pool_indices.tolist()
        cached = [
            table[request, :length].long()
            for request, length in zip(requests, forward_batch.seq_lens.tolist(), strict=True)
        ]
        for step, backend in enumerate(self.attn_backends):
            backend.slots = [
                torch.cat([before, branch[: step + 1]])
                for before, branches in zip(cached, drafts, strict=True)
                for branch in branches
            ]
